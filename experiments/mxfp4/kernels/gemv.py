"""y = x w^T for a few rows of x in 16 or 32 bits and a weight in mxfp4: the product of decoding.

Every byte of the weight is decoded in registers, for up to four rows of x at a time: what counts is
the time to read 4.25 bits a weight, on any GPU. No tensor core is involved.

A code becomes a float32 without a table. Code 13 is 1101: sign 1, exponent 10, mantissa 1. Its
sign goes to bit 31, the other three to bits 24 to 22, where a float32 has the end of its exponent
and the start of its mantissa: exponent 2 and mantissa 1.5, so -1.5 x 2^(2 - 127) = -3 x 2^-126. All
eight magnitudes come out as 2^-126 times their value: 0.5 is the subnormal 2^-127.

Shapes  x: (M, K), M at most 16; w: (N, K); y: (M, N).
Dtypes  x and y float32, bfloat16 or float16; arithmetic in float32.
Error   weights are exact from 2^-85 to 2^64: 0 below, NaN above; sums are rounded in float32.
"""

from pathlib import Path

import torch
from torch import Tensor

from experiments.mxfp4.numbers.formats import ScaledTensor
from nanochat.kernels.launch import Config, cdiv, launch
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.rms_norm import as_rows

ROWS_MAX = 16  # beyond, tensor cores on the dequantized weight are faster
ROWS_TOGETHER = 4  # more would spill registers
TILES = {
    rows: Config(
        f"gemv.{rows}",
        {"BLOCK_N": 8, "BLOCK_K": 512, "num_warps": 4, "origin": "not measured"},
        folder=Path(__file__).parent / "configs",
    )
    for rows in (1, ROWS_TOGETHER)
}
# Codes are read as float32 times 2^-126. Scales bring them half of the way back, so that none is
# infinite; the sum is multiplied by the other half.
HALF_WAY = tl.constexpr(63)
SCALE_MAX = tl.constexpr(127 + 64)


@triton.jit
def decoded(codes):
    """float32 values times 2^-126 of the low nibbles: sign, exponent and mantissa in place."""
    bits = ((codes & 8) << 28) | ((codes & 7) << 22)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e8m0_values(bytes_):
    """float32 values times 2^63 of scale bytes."""
    bits = tl.where(bytes_ > SCALE_MAX, 0x7FC00000, (bytes_.to(tl.int32) + HALF_WAY) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, y_ptr, M, N, K, x_stride, stride, scale_tiles,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program makes BLOCK_N outputs for ROWS rows of x. The sums keep the 16 bytes of each block
    # apart: they are added across threads once, after the loop.
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    scale_row = (n // 128).to(tl.int64) * scale_tiles * 512 + (n % 32) * 16 + (n % 128 // 32) * 4
    sums = tl.zeros((ROWS, BLOCK_N, BLOCK_K // 32, 16), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        # codes: (BLOCK_N, blocks, 16) bytes of two codes each
        byte = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        mask = (n < N) & (byte < stride)
        codes = tl.load(codes_ptr + n.to(tl.int64) * stride + byte, mask=mask, other=0)
        codes = tl.reshape(codes.to(tl.int32), (BLOCK_N, BLOCK_K // 32, 16))
        # one scale for each 16 bytes, straight out of the swizzled layout
        block = k // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
        at = scale_row + block // 4 * 512 + block % 4
        bytes_ = tl.load(scales_ptr + at, mask=(n < N) & (block * 32 < K), other=0)
        scales = e8m0_values(bytes_)[:, :, None]
        # x: (ROWS, blocks, 16), the element of the low nibble and that of the high one
        c = k + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + m.to(tl.int64) * x_stride + c, mask=(m < M) & (c < K), other=0.0)
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, BLOCK_K // 32, 16, 2)))
        sums += (decoded(codes) * scales)[None, :, :, :] * even[:, None, :, :]
        sums += (decoded(codes >> 4) * scales)[None, :, :, :] * odd[:, None, :, :]
    y = tl.sum(tl.sum(sums, axis=3), axis=2) * 9.223372036854775808e18  # 2^63
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    at = m.to(tl.int64) * N + n
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@torch.library.custom_op("mxfp4::gemv", mutates_args=())
def gemv_op(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`gemv` on the tensors of its weight."""
    x = as_rows(x)
    (M, K), (N, stride) = x.shape, codes.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    rows = 1 if M == 1 else ROWS_TOGETHER
    options = TILES[rows].choose(x)
    grid = (cdiv(N, options["BLOCK_N"]), cdiv(M, rows))
    arguments = x, codes, scales, y, M, N, K, x.stride(0), stride, scales.shape[1]
    launch(gemv_kernel, grid, *arguments, ROWS=rows, **options)
    return y


@gemv_op.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def gemv(x: Tensor, w: ScaledTensor) -> Tensor:
    """x w^T, (M, N) in the dtype of x. Raises ValueError for more rows, or another format or K."""
    if w.format != "mxfp4" or x.dim() != 2 or x.shape[1] != w.columns:
        raise ValueError(
            f"gemv needs x (M, {w.columns}) and a weight in mxfp4, got {tuple(x.shape)} and "
            f"{w.format}"
        )
    if not 1 <= x.shape[0] <= ROWS_MAX:
        raise ValueError(
            f"gemv takes 1 to {ROWS_MAX} rows, got {x.shape[0]}: quantize them and use matmul, or "
            "multiply with the dequantized weight"
        )
    return gemv_op(x, w.codes, w.scales)
