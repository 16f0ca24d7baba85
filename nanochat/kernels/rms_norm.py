"""RMSNorm without weights, alone and fused with the residual addition before it.

    rms_norm(x)           y = x / sqrt(mean(x^2) + eps)
    add_rms_norm(x, d)    x' = x + d,  y = rms_norm(x')

    backward, r = 1 / sqrt(mean(x^2) + eps):   dx = r (dy - y mean(dy y)),  plus dx' when added

Shapes  x, d, y: (..., D), normalised over D.
Dtypes  float32, bfloat16, float16; statistics in float32.
Saves   x alone (x' when added): the backward pass reads the whole row and finds r again.
Cost    rms_norm reads and writes 2 D elements a row; add_rms_norm 4 D, forward as backward.
Tiles   65,536 tokens of d12, D = 768, bfloat16: BLOCK_ROWS = 4 rows of BLOCK_D = 1024 channels (the
        next power of 2, 256 of them masked) make 16,384 programs. Each reads its 6 KiB once, sums
        squares along the rows in registers, and writes 6 KiB.
Source  B. Zhang and R. Sennrich, arXiv:1910.07467.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.launch import (
    Config,
    cdiv,
    launch,
    needs_triton,
    next_power_of_2,
    worth_compiling,
)
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import Workload

# explicit because the default of F.rms_norm depends on the dtype (7.8e-3 in bfloat16)
EPS = 1e-6
# A row stays in registers whole: 4 rows of 768 channels on 128 threads are 24 float32 a thread.
SMALL_ROWS = {"up_to": 1024, "num_warps": 4, "num_stages": 1}
LARGE_ROWS = {"up_to": 16_384, "BLOCK_ROWS": 1, "num_warps": 8, "num_stages": 1}
FORWARD = Config(
    "rms_norm.forward",
    SMALL_ROWS | {"BLOCK_ROWS": 4, "origin": "not measured: 16 bytes a thread and load"},
    LARGE_ROWS | {"origin": "not measured"},
)
BACKWARD = Config(
    "rms_norm.backward",
    SMALL_ROWS | {"BLOCK_ROWS": 2, "origin": "not measured: two rows of registers"},
    LARGE_ROWS | {"origin": "not measured"},
)


def reference(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + EPS) over the last axis."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def add_reference(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(x + delta, rms_norm(x + delta))."""
    x = x + delta
    return x, F.rms_norm(x, (x.shape[-1],), eps=EPS)


@triton.jit
def forward_kernel(
    x_ptr, delta_ptr, sum_ptr, y_ptr, rows, x_stride, delta_stride,
    D: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # a tile of whole rows: BLOCK_ROWS x BLOCK_D, int64 because row * stride may pass 2^31
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows) & (column < D)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    # the residual addition while x is in registers: it saves writing and reading x' once more
    if ADD:
        delta = tl.load(delta_ptr + row * delta_stride + column, mask=mask, other=0.0)
        # rounded as it is stored: y is the norm of the x' that the next block reads
        rounded = (x + delta.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + column, rounded, mask=mask)
        x = rounded.to(tl.float32)
    # masked channels were loaded as 0 and add nothing: the mean is over the true D
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + EPS)
    tl.store(y_ptr + row * D + column, (x * rstd).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x_ptr, dy_ptr, dsum_ptr, dx_ptr, rows, x_stride,
    D: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows) & (column < D)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * D + column, mask=mask, other=0.0).to(tl.float32)
    # r again from x: one more reduction, but nothing saved by the forward pass
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + EPS)
    normed = x * rstd
    # the part of dy along y changes the length of the row only, which the norm takes out again
    dx = rstd * (dy - normed * (tl.sum(dy * normed, axis=1, keep_dims=True) / D))
    # x' also continues to the next block, which sends its own gradient back
    if ADD:
        dx += tl.load(dsum_ptr + row * D + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * D + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def as_rows(x: Tensor) -> Tensor:
    """(rows, D) with unit stride along D: a view wherever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(kernel: Any, tiles: Config, rows: Tensor, *arguments: Any, add: bool) -> None:
    width = rows.shape[-1]
    options = tiles.choose(rows, width)
    grid = (cdiv(rows.shape[0], options["BLOCK_ROWS"]),)
    block = next_power_of_2(width)
    launch(kernel, grid, *arguments, D=width, EPS=EPS, ADD=add, BLOCK_D=block, **options)


@torch.library.custom_op("nanochat::rms_norm", mutates_args=())
def triton_rms_norm(x: Tensor) -> Tensor:
    """rms_norm on `forward_kernel`; any strides."""
    rows, y = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = rows, rows, y, y, rows.shape[0], rows.stride(0), rows.stride(0)
    _launch(forward_kernel, FORWARD, rows, *arguments, add=False)
    return y


@torch.library.custom_op("nanochat::rms_norm_backward", mutates_args=())
def triton_rms_norm_backward(x: Tensor, dy: Tensor, dsum: Tensor | None) -> Tensor:
    """dx of rms_norm at x, plus dsum where the norm followed an addition."""
    rows, dy = as_rows(x), dy.contiguous()
    added = dy if dsum is None else dsum.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = rows, dy, added, dx, rows.shape[0], rows.stride(0)
    _launch(backward_kernel, BACKWARD, rows, *arguments, add=dsum is not None)
    return dx


@torch.library.custom_op("nanochat::add_rms_norm", mutates_args=())
def triton_add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """add_rms_norm on `forward_kernel`; x and delta of one shape and dtype, any strides."""
    if x.shape != delta.shape or x.dtype != delta.dtype:
        raise ValueError(
            f"add_rms_norm needs two operands of one shape and dtype, got {tuple(x.shape)} "
            f"{x.dtype} and {tuple(delta.shape)} {delta.dtype}"
        )
    rows, added = as_rows(x), as_rows(delta)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(total)
    arguments = rows, added, total, y, rows.shape[0], rows.stride(0), added.stride(0)
    _launch(forward_kernel, FORWARD, rows, *arguments, add=True)
    return total, y


@triton_rms_norm.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton_rms_norm_backward.register_fake
def _(x: Tensor, dy: Tensor, dsum: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton_add_rms_norm.register_fake
def _(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, torch.empty_like(total)


def _save_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _save_sum(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0])


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return triton_rms_norm_backward(ctx.saved_tensors[0], dy, None)


def _add_backward(ctx: Any, dsum: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx = triton_rms_norm_backward(ctx.saved_tensors[0], dy, dsum)
    return dx, dx  # x and delta enter the sum alike


triton_rms_norm.register_autograd(_backward, setup_context=_save_input)
triton_add_rms_norm.register_autograd(_add_backward, setup_context=_save_sum)


def cost(x: Tensor) -> Cost:
    """x and y; x, dy and dx."""
    size = x.numel() * x.element_size()
    return Cost(4 * x.numel(), 2 * size, Cost(10 * x.numel(), 3 * size))


def add_cost(x: Tensor, delta: Tensor) -> Cost:
    """x, d, x' and y; x', dy, dx' and the gradient that x and d share."""
    size = x.numel() * x.element_size()
    return Cost(5 * x.numel(), 4 * size, Cost(11 * x.numel(), 4 * size))


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor]]:
    """One row, odd rows and widths, rows of a wider tensor, then the d12 model's width."""
    for shape in ((1, 8), (3, 5, 96), (7, 1), (2, 33, 768)):
        yield (torch.randn(shape, device=device, dtype=dtype),)
    yield (torch.randn(4, 9, 100, device=device, dtype=dtype)[..., 3:67],)


def add_examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """As `examples`, with a second operand."""
    for (x,) in examples(device, dtype):
        yield x, torch.randn_like(x)


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    """The residual stream."""
    return (torch.randn(w.tokens, w.width, device=device, dtype=dtype),)


def add_workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream and what a block adds to it."""
    (x,) = workload(w, device, dtype)
    return x, torch.randn_like(x)


rms_norm = Op(
    "rms_norm", reference, cost, examples, workload, summary="one pass over memory each way"
)
rms_norm.add("triton", triton_rms_norm, needs_triton, worth_compiling)
add_rms_norm = Op(
    "add_rms_norm", add_reference, add_cost, add_examples, add_workload,
    summary="the addition before the norm in the same pass, and both gradients at once",
)  # fmt: skip
add_rms_norm.add("triton", triton_add_rms_norm, needs_triton, worth_compiling)
