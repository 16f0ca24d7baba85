"""Quantize a matrix along its rows, along its columns, or both in one pass over it.

    rows     Q(f(x))     (M, K)   blocks along K: the operand of y = x w^T
    columns  Q(f(x)^T)   (K, M)   blocks along M: the operand of dw = dy^T x

f is the identity, relu(x)^2, or rms_norm(x). Its result is rounded to the dtype of x: fusing
changes no bit. Each orientation has its own `formats.Quantizer`.

Shapes  x: (M, K), any row stride; K, and M where columns are asked for, are multiples of 32.
Dtypes  float32, bfloat16, float16; arithmetic in float32, Hadamard products of bfloat16.
Cost    x read once (rms_norm: once from memory, again from L2), and the codes and scales written.
Error   NaN and infinity become NaN blocks: the kernels cannot raise without stopping the GPU.
"""

from pathlib import Path

import torch
from torch import Tensor

from experiments.mxfp4.kernels.blocks import (
    constants_of,
    has_e2m1_conversion,
    store_quantized,
)
from experiments.mxfp4.numbers.formats import FORMATS, Quantizer, ScaledTensor, check_matrix
from experiments.mxfp4.numbers.layout import TILE_ROWS, swizzled_shape
from nanochat.kernels.launch import Config, architecture_of, cdiv, launch
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.relu2_mlp_kernels import activated
from nanochat.kernels.rms_norm import EPS, as_rows

PROLOGUES = ("none", "relu2", "rms_norm")
TABLES = Path(__file__).parent / "configs"
TILE = {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 8, "origin": "not measured"}
TILES = Config("quantize.tiles", TILE, folder=TABLES)
RMS_NORM = Config("quantize.rms_norm", TILE, folder=TABLES)


@triton.jit
def load_tile(x_ptr, row, column, M, K, x_stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_M, BLOCK_K) in the dtype of x, 0 outside."""
    r = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    c = column + tl.arange(0, BLOCK_K)[None, :]
    return tl.load(x_ptr + r * x_stride + c, mask=(r < M) & (c < K), other=0.0)


@triton.jit
def store_both(
    x, row_codes_ptr, row_scales_ptr, column_codes_ptr, column_scales_ptr,
    tensor_scale_ptr, seed_ptr, signs_ptr, stream, row, column, M, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # x is read from memory once; its transpose is a shuffle through shared memory
    if ROWS is not None:
        store_quantized(
            x, row_codes_ptr, row_scales_ptr, tensor_scale_ptr, seed_ptr, signs_ptr, stream,
            row, column, M, K, ROWS, 0, PTX, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if COLUMNS is not None:
        store_quantized(
            tl.trans(x), column_codes_ptr, column_scales_ptr, tensor_scale_ptr, seed_ptr, signs_ptr,
            stream, column, row, K, M, COLUMNS, 1, PTX, BLOCK_K, BLOCK_M,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stream"])
def tiles_kernel(
    x_ptr, row_codes_ptr, row_scales_ptr, column_codes_ptr, column_scales_ptr,
    tensor_scale_ptr, seed_ptr, signs_ptr, stream, M, K, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RELU2: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    x = load_tile(x_ptr, row, column, M, K, x_stride, BLOCK_M, BLOCK_K).to(tl.float32)
    if RELU2:  # rounded to the dtype of x, as the unfused operation would have stored it
        x = activated(x).to(x_ptr.dtype.element_ty).to(tl.float32)
    store_both(
        x, row_codes_ptr, row_scales_ptr, column_codes_ptr, column_scales_ptr,
        tensor_scale_ptr, seed_ptr, signs_ptr, stream, row, column, M, K,
        ROWS, COLUMNS, PTX, BLOCK_M, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stream"])
def rms_norm_kernel(
    x_ptr, row_codes_ptr, row_scales_ptr, column_codes_ptr, column_scales_ptr,
    tensor_scale_ptr, seed_ptr, signs_ptr, stream, M, K, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program owns whole rows: once over them for the norm, again, from L2, to quantize.
    row = tl.program_id(0) * BLOCK_M
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for column in range(0, K, BLOCK_K):
        x = load_tile(x_ptr, row, column, M, K, x_stride, BLOCK_M, BLOCK_K).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / K + EPS)
    # as far as the tiles of scales reach, 128 columns at a time, so that their padding is written
    for column in range(0, tl.cdiv(K, 128) * 128, BLOCK_K):
        x = load_tile(x_ptr, row, column, M, K, x_stride, BLOCK_M, BLOCK_K).to(tl.float32)
        y = (x * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)
        store_both(
            y, row_codes_ptr, row_scales_ptr, column_codes_ptr, column_scales_ptr,
            tensor_scale_ptr, seed_ptr, signs_ptr, stream, row, column, M, K,
            ROWS, COLUMNS, PTX, BLOCK_M, BLOCK_K,
        )  # fmt: skip


def empty_outputs(x: Tensor, text: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes and swizzled scales of (rows, columns), unwritten; empty where there is no quantizer.

    (768, 3072) in mxfp4: codes (768, 1536), scales (6, 24, 512), together 4.25 bits an element.
    """
    if not text:
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.uint8)
    fmt = FORMATS[Quantizer.parse(text).format]
    shape = swizzled_shape(rows, columns // fmt.block)
    return (
        torch.empty((rows, columns // fmt.elements_per_byte), dtype=torch.uint8, device=x.device),
        torch.empty(shape, dtype=torch.uint8, device=x.device),
    )


@torch.library.custom_op("mxfp4::quantize", mutates_args=())
def quantize_op(
    x: Tensor, rows: str, columns: str, prologue: str,
    seed: Tensor | None, stream: int, signs: Tensor | None, scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes and scales of the rows, then of the columns; `quantize` is the way to call this."""
    x = as_rows(x)
    M, K = x.shape
    outputs = (*empty_outputs(x, rows, M, K), *empty_outputs(x, columns, K, M))
    constants = {"ROWS": constants_of(rows), "COLUMNS": constants_of(columns),
                 "PTX": has_e2m1_conversion(architecture_of(x.device))}  # fmt: skip
    arguments = x, *outputs, scale, seed, signs, stream, M, K, x.stride(0)
    down, along = (cdiv(size, TILE_ROWS) * TILE_ROWS for size in (M, K))
    if prologue == "rms_norm":
        options = RMS_NORM.choose(x)
        grid = (cdiv(down, options["BLOCK_M"]),)
        launch(rms_norm_kernel, grid, *arguments, EPS=EPS, **constants, **options)
    else:
        options = TILES.choose(x)
        grid = (cdiv(down, options["BLOCK_M"]), cdiv(along, options["BLOCK_K"]))
        launch(tiles_kernel, grid, *arguments, RELU2=prologue == "relu2", **constants, **options)
    return outputs


@quantize_op.register_fake
def _(x, rows, columns, prologue, seed, stream, signs, scale):
    M, K = x.shape
    return (*empty_outputs(x, rows, M, K), *empty_outputs(x, columns, K, M))


def quantize(
    x: Tensor,
    rows: Quantizer | None,
    columns: Quantizer | None = None,
    *,
    prologue: str = "none",
    seed: Tensor | None = None,
    stream: int = 0,
    signs: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[ScaledTensor | None, ScaledTensor | None]:
    """(Q(f(x)), Q(f(x)^T)); None for an orientation without a quantizer.

    prologue  f: "none", "relu2" or "rms_norm"
    seed      int64 () on the device of x, for stochastic rounding: one value a step
    stream    which bits of that seed: a constant of the call site
    signs     int64 () on the device of x: of the Hadamard transforms; None flips none
    scale     float32 () on the device of x: the tensor scale of nvfp4
    Raises    ValueError for shapes that do not divide into blocks and for missing arguments.
    """
    if prologue not in PROLOGUES:
        raise ValueError(f"prologue is {prologue!r}; choose one of {', '.join(PROLOGUES)}")
    chosen = [q for q in (rows, columns) if q is not None]
    if not chosen:
        raise ValueError("nothing to quantize: give a quantizer for rows, columns or both")
    if rows is not None:
        check_matrix(x, rows)
    if columns is not None:
        check_matrix(x.mT, columns)
    if seed is None and any(q.rounding == "stochastic" for q in chosen):
        raise ValueError("stochastic rounding needs a seed: an int64 () tensor on x's device")
    if scale is None and any(q.format == "nvfp4" for q in chosen):
        raise ValueError("nvfp4 needs a tensor scale: pass scale=reference.tensor_scale(x)")
    texts = ["" if q is None else str(q) for q in (rows, columns)]
    tensors = quantize_op(x, *texts, prologue, seed, stream, signs, scale)
    M, K = x.shape
    return (
        None if rows is None else _scaled(tensors[:2], rows, K, scale),
        None if columns is None else _scaled(tensors[2:], columns, M, scale),
    )


def _scaled(
    tensors: tuple[Tensor, ...], quantizer: Quantizer, columns: int, scale: Tensor | None
) -> ScaledTensor:
    codes, scales = tensors
    total = scale if quantizer.format == "nvfp4" else None
    return ScaledTensor(codes, scales, quantizer.format, columns, total)
