"""Rotary embedding, then RMSNorm, of the heads of one tensor.

    (x1, x2) halves of a head;  r1 = x1 cos + x2 sin,  r2 = x2 cos - x1 sin
    n = r / sqrt(mean(r^2) + eps),  y = scale n

    backward:  dr = scale (dy - n mean(dy n)) / sqrt(mean(r^2) + eps)
               dx1 = dr1 cos - dr2 sin,  dx2 = dr1 sin + dr2 cos

Shapes  x_BTHD, y: (B, T, H, D); cos, sin: (S, D/2) tables, S above the largest position;
        offsets_B: (B,) position of each row's first token, or None for 0.
Dtypes  float32, bfloat16, float16; tables in float32 and constant, arithmetic in float32.
Saves   x alone: the backward pass rotates again.
Cost    reads and writes B T H D elements; backward reads twice that and writes once.
Source  RoPE arXiv:2104.09864 (rotation by -theta, halves not interleaved);
        QK-norm arXiv:2010.04245.
        The rotation comes first: rounded tables are not exactly orthonormal, the norm is.
"""
# pyright: reportGeneralTypeIssues=false
# (a call between two jit functions looks like one that never returns)

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
from nanochat.kernels.rms_norm import EPS
from nanochat.kernels.workloads import HEAD_DIM, Workload

WARPS = {"num_warps": 4, "num_stages": 1, "origin": "not measured: 8 KiB of a head a step"}
FORWARD = Config(
    "norm_rope.forward", {"element_size": 4, "BLOCK_T": 16, **WARPS}, {"BLOCK_T": 32, **WARPS}
)
BACKWARD = Config(
    "norm_rope.backward", {"element_size": 4, "BLOCK_T": 8, **WARPS}, {"BLOCK_T": 16, **WARPS}
)


def rotary_tables(
    sequence_len: int, head_dim: int, base: float, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / D), each (sequence_len, head_dim / 2) in float32."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    frequencies = base ** (-channels / head_dim)
    positions = torch.arange(sequence_len, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def reference(
    x_BTHD: Tensor, cos: Tensor, sin: Tensor, offsets_B: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Every head rotated and normalised."""
    positions = torch.arange(x_BTHD.shape[1], device=cos.device)
    if offsets_B is not None:
        positions = positions + offsets_B[:, None]  # (B, T)
    cos, sin = (table.detach()[positions].unsqueeze(-2) for table in (cos, sin))
    x1, x2 = x_BTHD.to(torch.promote_types(x_BTHD.dtype, cos.dtype)).chunk(2, dim=-1)
    rotated = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
    return (scale * F.rms_norm(rotated, (rotated.shape[-1],), eps=EPS)).to(x_BTHD.dtype)


@triton.jit
def _rotate(x_ptr, cos, sin, channel, mask, HALF: tl.constexpr, EPS: tl.constexpr):
    """Rotated halves of the head at x_ptr, and 1 / rms of the head."""
    x1 = tl.load(x_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF + channel, mask=mask, other=0.0).to(tl.float32)
    r1 = x1 * cos + x2 * sin
    r2 = x2 * cos - x1 * sin
    mean = tl.sum(r1 * r1 + r2 * r2, axis=1, keep_dims=True) / (2 * HALF)
    return r1, r2, tl.rsqrt(mean + EPS)


@triton.jit
def _tables(
    cos_ptr, sin_ptr, offsets_ptr, batch, token, channel, mask, HALF, OFFSETS: tl.constexpr
):
    position = token
    if OFFSETS:
        position += tl.load(offsets_ptr + batch, mask=mask, other=0)
    entry = position * HALF + channel
    cos = tl.load(cos_ptr + entry, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + entry, mask=mask, other=0.0)


@triton.jit
def forward_kernel(
    x_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, offsets_ptr, scale, tokens, T,
    x_stride_b, x_stride_t, x_stride_h,
    H: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    OFFSETS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    batch, token = row // T, row % T
    mask = (row < tokens) & (channel < HALF)
    cos, sin = _tables(cos_ptr, sin_ptr, offsets_ptr, batch, token, channel, mask, HALF, OFFSETS)
    x_ptr += batch * x_stride_b + token * x_stride_t
    for head in range(H + HKV):
        r1, r2, rrms = _rotate(x_ptr + head * x_stride_h, cos, sin, channel, mask, HALF, EPS)
        if head < H:
            y_ptr = q_ptr + (row * H + head) * 2 * HALF + channel
        else:
            y_ptr = k_ptr + (row * HKV + head - H) * 2 * HALF + channel
        tl.store(y_ptr, (scale * r1 * rrms).to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + HALF, (scale * r2 * rrms).to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x_ptr, dq_ptr, dk_ptr, dv_ptr, dx_ptr, cos_ptr, sin_ptr, offsets_ptr, scale, tokens, T,
    x_stride_b, x_stride_t, x_stride_h, dq_stride_b, dq_stride_t, dq_stride_h,
    dk_stride_b, dk_stride_t, dk_stride_h, dv_stride_b, dv_stride_t, dv_stride_h,
    H: tl.constexpr, HKV: tl.constexpr, VALUES: tl.constexpr, HALF: tl.constexpr,
    EPS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    batch, token = row // T, row % T
    mask = (row < tokens) & (channel < HALF)
    cos, sin = _tables(cos_ptr, sin_ptr, offsets_ptr, batch, token, channel, mask, HALF, OFFSETS)
    x_ptr += batch * x_stride_b + token * x_stride_t
    dx_ptr += row * (H + HKV + VALUES) * 2 * HALF + channel
    dq_ptr += batch * dq_stride_b + token * dq_stride_t + channel
    dk_ptr += batch * dk_stride_b + token * dk_stride_t + channel
    dv_ptr += batch * dv_stride_b + token * dv_stride_t + channel
    for head in range(H + HKV):
        r1, r2, rrms = _rotate(x_ptr + head * x_stride_h, cos, sin, channel, mask, HALF, EPS)
        n1, n2 = r1 * rrms, r2 * rrms
        dy_ptr = dq_ptr + head * dq_stride_h if head < H else dk_ptr + (head - H) * dk_stride_h
        dy1 = scale * tl.load(dy_ptr, mask=mask, other=0.0).to(tl.float32)
        dy2 = scale * tl.load(dy_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(dy1 * n1 + dy2 * n2, axis=1, keep_dims=True) / (2 * HALF)
        dr1, dr2 = rrms * (dy1 - n1 * mean), rrms * (dy2 - n2 * mean)
        dx = (dr1 * cos - dr2 * sin).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + head * 2 * HALF, dx, mask=mask)
        dx = (dr1 * sin + dr2 * cos).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + (head * 2 + 1) * HALF, dx, mask=mask)
    for head in range(VALUES):
        for half in range(2):
            dv = tl.load(dv_ptr + head * dv_stride_h + half * HALF, mask=mask, other=0.0)
            tl.store(dx_ptr + ((H + HKV + head) * 2 + half) * HALF, dv, mask=mask)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    kernel: Any, tiles: Config, x_BTHD: Tensor, offsets_B: Tensor | None, *args: Any, **sizes: int
) -> None:
    B, T, _, D = x_BTHD.shape
    options = tiles.choose(x_BTHD, D)
    grid = (cdiv(B * T, options["BLOCK_T"]),)
    options |= sizes | {"HALF": D // 2, "BLOCK_C": next_power_of_2(D // 2)}
    launch(kernel, grid, *args, **options, EPS=EPS, OFFSETS=offsets_B is not None)


@torch.library.custom_op("nanochat::norm_rope", mutates_args=())
def triton_forward(
    x_BTHD: Tensor, cos: Tensor, sin: Tensor, num_heads: int, offsets_B: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Rotated and normalised: the first num_heads heads of x, and the others; both contiguous."""
    x = _unit_stride(x_BTHD)
    B, T, heads, D = x.shape
    if cos.shape[-1] * 2 != D or cos.shape != sin.shape:
        raise ValueError(
            f"tables of shape {tuple(cos.shape)} do not rotate heads of {D} channels; "
            f"make them with rotary_tables(sequence_len, {D}, ...)"
        )
    q, k = (
        torch.empty((B, T, n, D), dtype=x.dtype, device=x.device)
        for n in (num_heads, heads - num_heads)
    )
    offsets = cos if offsets_B is None else offsets_B
    tensors = x, q, k, cos.contiguous(), sin.contiguous(), offsets
    strides = x.stride()[:3]
    sizes = {"H": num_heads, "HKV": heads - num_heads}
    _launch(forward_kernel, FORWARD, x, offsets_B, *tensors, scale, B * T, T, *strides, **sizes)
    return q, k


@torch.library.custom_op("nanochat::norm_rope_backward", mutates_args=())
def triton_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    x_BTHD: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets_B: Tensor | None,
    scale: float,
) -> Tensor:
    """Gradient (B, T, heads, D) of q's, k's and v's heads side by side; x holds q's and k's."""
    x, dq = _unit_stride(x_BTHD), _unit_stride(dq)
    dk = _unit_stride(dk)
    values = 0 if dv is None else dv.shape[2]
    dv = dq if dv is None else _unit_stride(dv)
    B, T, heads, D = x.shape
    dx = torch.empty((B, T, heads + values, D), dtype=x.dtype, device=x.device)
    offsets = cos if offsets_B is None else offsets_B
    tensors = x, dq, dk, dv, dx, cos.contiguous(), sin.contiguous(), offsets
    strides = [s for t in (x, dq, dk, dv) for s in t.stride()[:3]]
    sizes = {"H": dq.shape[2], "HKV": heads - dq.shape[2], "VALUES": values}
    _launch(backward_kernel, BACKWARD, x, offsets_B, *tensors, scale, B * T, T, *strides, **sizes)
    return dx


@triton_forward.register_fake
def _(
    x_BTHD: Tensor, cos: Tensor, sin: Tensor, num_heads: int, offsets_B: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, T, heads, D = x_BTHD.shape
    return x_BTHD.new_empty(B, T, num_heads, D), x_BTHD.new_empty(B, T, heads - num_heads, D)


@triton_backward.register_fake
def _(
    dq: Tensor, dk: Tensor, dv: Tensor, x_BTHD: Tensor, cos: Tensor, sin: Tensor,
    offsets_B: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    B, T, heads, D = x_BTHD.shape
    return x_BTHD.new_empty(B, T, heads + (0 if dv is None else dv.shape[2]), D)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BTHD, cos, sin, _, offsets_B, ctx.scale = inputs
    ctx.save_for_backward(x_BTHD, cos, sin, offsets_B)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    dx = triton_backward(dq, dk, None, *ctx.saved_tensors, ctx.scale)
    return dx, None, None, None, None, None


triton_forward.register_autograd(_backward, setup_context=_setup_context)


def triton_norm_rope(
    x_BTHD: Tensor, cos: Tensor, sin: Tensor, offsets_B: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """`reference` in one launch each way."""
    return triton_forward(x_BTHD, cos, sin, x_BTHD.shape[2], offsets_B, scale)[0]


def cost(x_BTHD: Tensor, *args: Any, **kwargs: Any) -> Cost:
    """Forward: one read, one write."""
    return Cost(14 * x_BTHD.numel(), 2 * x_BTHD.numel() * x_BTHD.element_size())


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """One head, offsets and a scale, odd sizes in a wider tensor, then d12's heads."""
    for B, T, H, D, offset, scale in (
        (1, 1, 1, 8, 0, 1.0),
        (2, 17, 4, 64, 5, 1.2),
        (3, 5, 3, 24, 0, 1.0),
        (1, 33, 6, 128, 0, 1.0),
    ):
        x = torch.randn(B, T + 2, H + 1, D, device=device, dtype=dtype)[:, 1:-1, :H]
        offsets = torch.arange(B, device=device) + offset if offset else None
        yield x, *rotary_tables(T + offset + B, D, 10_000.0, device), offsets, scale


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """The queries of whole sequences."""
    length = w.tokens // w.batch
    x_BTHD = torch.randn(w.batch, length, w.heads, HEAD_DIM, device=device, dtype=dtype)
    return x_BTHD, *rotary_tables(length, HEAD_DIM, 10_000.0, device)


norm_rope = Op(
    "norm_rope", reference, cost, examples, workload,
    summary="rotation and norm in one pass each way; backward rotates again instead of saving",
)  # fmt: skip
norm_rope.add("triton", triton_norm_rope, needs_triton, worth_compiling)
