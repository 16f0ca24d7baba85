"""Quantizing and dequantizing in plain PyTorch: the oracle of the kernels, and their emulation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.mxfp4.numbers.formats import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    FORMATS,
    Format,
    Quantizer,
    ScaledTensor,
    check_matrix,
)
from experiments.mxfp4.numbers.layout import (
    pack_nibbles,
    swizzle_scales,
    unpack_nibbles,
    unswizzle_scales,
)
from experiments.mxfp4.numbers.randomness import hadamard, random_bits

E8M0_NAN = 255
# smallest scales of nvfp4, of a block and of a tensor: the reciprocal of their product is finite
E4M3_TINY = 2.0**-6
TENSOR_SCALE_MIN = 2.0**-120
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def tensor_scale(x: Tensor) -> Tensor:
    """The float32 () scale of an nvfp4 tensor: its largest magnitude / (448 * 6)."""
    return (x.abs().amax().float() / (E4M3_MAX * E2M1_MAX)).clamp(min=TENSOR_SCALE_MIN)


def e8m0_scales(largest: Tensor, fmt: Format, mode: str) -> Tensor:
    """Scale bytes, uint8, of blocks with these largest magnitudes (float32); 255 if not finite."""
    # bits >> 23 is the exponent plus 127, the bias of E8M0 too (largest has no sign bit)
    bits = largest.contiguous().view(torch.int32)
    if mode == "even":  # half of an element's last mantissa bit is added; it may carry over
        exponent = bits + (1 << 22 - fmt.mantissa_bits) >> 23
    elif mode == "rceil":
        exponent = (bits >> 23) + (bits & 0x7FFFFF > fmt.largest_mantissa)
    else:
        exponent = bits >> 23
    exponent = (exponent - fmt.exponent).clamp(min=0)
    return torch.where(largest.isfinite(), exponent, E8M0_NAN).to(torch.uint8)


def encode_e2m1(y: Tensor) -> Tensor:
    """Codes 0..15, uint8, of float32 values; bit 3 is the sign."""
    magnitude = y.abs().clamp(max=E2M1_MAX)
    step, first = _binade(magnitude)
    code = (magnitude / step).round() + first  # round() breaks ties to even, and `first` is even
    return code.to(torch.uint8) | torch.signbit(y).to(torch.uint8) << 3


def decode_e2m1(codes: Tensor) -> Tensor:
    """float32 values of codes 0..15."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    return table[codes.long()]


def dither(y: Tensor, bits: Tensor) -> Tensor:
    """y moved within half a step of E2M1, so that rounding it to nearest rounds y stochastically.

    bits  16 random bits an element. The bias of the rounding is at most 2^-17 of a step.
    """
    magnitude = y.abs().clamp(max=E2M1_MAX)
    step, first = _binade(magnitude)
    offset = (bits.float() + 0.5) * 2.0**-16 - 0.5
    # no lower than the binade: below it steps are finer, and a value there is no neighbour of y
    return torch.copysign(torch.maximum(magnitude + offset * step, first), y)


def _binade(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Distance between E2M1 neighbours at a magnitude, and the first value with that distance."""
    # the power of two below the magnitude, made of the exponent bits alone; 1 for all below 2
    exponent = magnitude.clamp(min=1).view(torch.int32) & 0x7F800000
    step = exponent.view(torch.float32) * 0.5  # 0.5 below 2, 1 below 4, 2
    return step, step * 2 * (step > 0.5)


def quantize(
    x: Tensor,
    quantizer: Quantizer,
    *,
    seed: int | Tensor = 0,
    stream: int = 0,
    transposed: bool = False,
    signs: Tensor | None = None,
    scale: Tensor | None = None,
    propagate: bool = False,
) -> ScaledTensor:
    """Quantize a matrix (rows, columns) along its columns.

    seed, stream, transposed  choose the bits of stochastic rounding (`randomness.random_bits`)
    signs      int64 (): of the Hadamard transform
    scale      float32 (): of an nvfp4 tensor; None measures `tensor_scale(x)`
    propagate  blocks with NaN or infinity get a NaN scale, as from the kernels; otherwise an error
    Raises     ValueError for columns that do not divide into blocks, and for NaN or infinity.
    """
    check_matrix(x, quantizer)
    fmt = FORMATS[quantizer.format]
    if not propagate and not torch.isfinite(x).all():
        count = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{count} of {x.numel()} elements to quantize are NaN or infinite")
    # scales: one for each block of the transformed matrix
    values = hadamard(x, signs) if quantizer.hadamard else x.float()
    if fmt.name == "nvfp4" and scale is None:
        scale = tensor_scale(values)
    blocks = values.unflatten(-1, (-1, fmt.block))
    bytes_, reciprocal = _block_scales(blocks.abs().amax(-1), fmt, quantizer.scale_mode, scale)
    # elements: what is left is within the range of an element, or saturates there
    y = (blocks * reciprocal[..., None]).flatten(-2)
    if quantizer.rounding == "stochastic":
        rows, columns = x.shape
        y = dither(y, random_bits(rows, columns, seed, stream, transposed, x.device))
    if fmt.element == "e2m1":
        codes = pack_nibbles(encode_e2m1(y))
    else:
        y = y.clamp(-fmt.element_max, fmt.element_max)
        codes = y.to(FLOAT8[fmt.element]).view(torch.uint8)
    return ScaledTensor(codes, swizzle_scales(bytes_), fmt.name, x.shape[1], scale)


def _block_scales(
    largest: Tensor, fmt: Format, mode: str, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale bytes, and the float32 factor that brings a block into the element's range."""
    if scale is None:
        bytes_ = e8m0_scales(largest, fmt, mode)
        return bytes_, (254 - bytes_.int() << 23).view(torch.float32)  # 2^(127 - byte), exactly
    wanted = (largest / E2M1_MAX / scale).clamp(E4M3_TINY, E4M3_MAX)
    rounded = torch.where(largest.isfinite(), wanted, math.nan).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8), 1.0 / scale / rounded.float()


def block_scales(t: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, blocks): the factor of each block, that of the tensor included."""
    fmt = FORMATS[t.format]
    bytes_ = unswizzle_scales(t.scales, t.shape[0], t.columns // fmt.block)
    if t.tensor_scale is not None:
        return bytes_.view(torch.float8_e4m3fn).to(dtype) * t.tensor_scale.to(dtype)
    return bytes_.view(torch.float8_e8m0fnu).to(dtype)


def dequantize(t: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, columns) values, computed in float32, or in float64 if asked for.

    Error  none in the MX formats: a product of an element and a power of two is exact in float32,
           and in bfloat16 too, as long as it does not leave their exponents.
    """
    fmt = FORMATS[t.format]
    wide = torch.promote_types(dtype, torch.float32)
    if fmt.element == "e2m1":
        all_bytes = torch.arange(256, dtype=torch.uint8, device=t.codes.device)[:, None]
        two_values = decode_e2m1(unpack_nibbles(all_bytes))  # of a byte
        values = F.embedding(t.codes.int(), two_values).flatten(-2)
    else:
        values = t.codes.view(FLOAT8[fmt.element])
    blocks = values.to(wide).unflatten(-1, (-1, fmt.block)) * block_scales(t, wide)[..., None]
    return blocks.flatten(-2).to(dtype)
