"""Kernels of norm_rope and qk_norm_rope: rotate heads and divide each by its RMS, and back.

Both read heads that lie side by side in one row for each token, as a projection leaves them: those
of q, then those of k. Forward writes q and k as tensors of their own, for attention; backward
writes one packed row again, the gradient of the projection.

Tiles    d12 in bfloat16: six heads of q and six of k, D = 128, HALF = 64. With BLOCK_T = 32 a
         program takes 32 tokens and all their heads, one head after the other. cos and sin are two
         tiles of 32 x 64 that stay in registers, while twelve times two tiles of 32 x 64, the
         halves x1 and x2 of a head, pass by. 65,536 tokens are 2,048 programs.
Source   norm_rope.py has the equations.
"""
# pyright: reportGeneralTypeIssues=false
# (a call between two jit functions looks like one that never returns)

from typing import Any

import torch
from torch import Tensor

from nanochat.kernels.launch import Config, cdiv, launch, next_power_of_2
from nanochat.kernels.optional_triton import tl, triton
from nanochat.kernels.rms_norm import EPS, as_rows

WARPS = {"num_warps": 4, "num_stages": 1, "origin": "not measured: 8 KiB of a head a step"}
FORWARD = Config(
    "norm_rope.forward", {"element_size": 4, "BLOCK_T": 16, **WARPS}, {"BLOCK_T": 32, **WARPS}
)
BACKWARD = Config(
    "norm_rope.backward", {"element_size": 4, "BLOCK_T": 8, **WARPS}, {"BLOCK_T": 16, **WARPS}
)


@triton.jit
def _rows(tokens, T, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row, batch and position (BLOCK_T, 1) of a program's tokens, channels (1, BLOCK_C), mask."""
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    return row, row // T, row % T, channel, (row < tokens) & (channel < HALF)


@triton.jit
def _tables(
    cos_ptr, sin_ptr, offsets_ptr, batch, token, channel, mask, HALF, OFFSETS: tl.constexpr
):
    """cos and sin of each token, (BLOCK_T, BLOCK_C): all heads of a token turn alike."""
    position = token
    if OFFSETS:  # decoding: each row continues its own sequence
        position += tl.load(offsets_ptr + batch, mask=mask, other=0)
    entry = position * HALF + channel
    cos = tl.load(cos_ptr + entry, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + entry, mask=mask, other=0.0)


@triton.jit
def _rotate(x_ptrs, cos, sin, mask, HALF: tl.constexpr, EPS: tl.constexpr):
    """Rotated halves of one head of each token, and 1 / rms of the head."""
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    r1 = x1 * cos + x2 * sin
    r2 = x2 * cos - x1 * sin
    # masked channels are 0 and add nothing, so the mean is over the true 2 HALF
    mean = tl.sum(r1 * r1 + r2 * r2, axis=1, keep_dims=True) / (2 * HALF)
    return r1, r2, tl.rsqrt(mean + EPS)


@triton.jit
def _head_forward(x_ptrs, y_ptrs, cos, sin, scale, mask, HALF: tl.constexpr, EPS: tl.constexpr):
    """y of one head."""
    r1, r2, rrms = _rotate(x_ptrs, cos, sin, mask, HALF, EPS)
    tl.store(y_ptrs, (scale * r1 * rrms).to(y_ptrs.dtype.element_ty), mask=mask)
    tl.store(y_ptrs + HALF, (scale * r2 * rrms).to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _head_backward(
    x_ptrs, dy_ptrs, dx_ptrs, cos, sin, scale, mask, HALF: tl.constexpr, EPS: tl.constexpr
):
    """dx of one head."""
    # the forward pass again: cheaper than reading what it could have saved
    r1, r2, rrms = _rotate(x_ptrs, cos, sin, mask, HALF, EPS)
    n1, n2 = r1 * rrms, r2 * rrms
    # back through the norm
    dy1 = scale * tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    dy2 = scale * tl.load(dy_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(dy1 * n1 + dy2 * n2, axis=1, keep_dims=True) / (2 * HALF)
    dr1, dr2 = rrms * (dy1 - n1 * mean), rrms * (dy2 - n2 * mean)
    # back through the rotation: its transpose, the rotation by the opposite angle
    dx1, dx2 = dr1 * cos - dr2 * sin, dr1 * sin + dr2 * cos
    tl.store(dx_ptrs, dx1.to(dx_ptrs.dtype.element_ty), mask=mask)
    tl.store(dx_ptrs + HALF, dx2.to(dx_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    x_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, offsets_ptr, scale, tokens, T, x_stride,
    H: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    OFFSETS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, batch, token, channel, mask = _rows(tokens, T, HALF, BLOCK_T, BLOCK_C)
    cos, sin = _tables(cos_ptr, sin_ptr, offsets_ptr, batch, token, channel, mask, HALF, OFFSETS)
    # x has the heads of q and k side by side; q and k are contiguous tensors of their own
    D: tl.constexpr = 2 * HALF
    x_ptrs = x_ptr + row * x_stride + channel
    q_ptrs = q_ptr + row * H * D + channel
    k_ptrs = k_ptr + row * HKV * D + channel
    for head in range(H):
        _head_forward(x_ptrs + head * D, q_ptrs + head * D, cos, sin, scale, mask, HALF, EPS)
    x_ptrs += H * D
    for head in range(HKV):
        _head_forward(x_ptrs + head * D, k_ptrs + head * D, cos, sin, scale, mask, HALF, EPS)


@triton.jit
def backward_kernel(
    x_ptr, dq_ptr, dk_ptr, dv_ptr, dx_ptr, cos_ptr, sin_ptr, offsets_ptr, scale, tokens, T,
    x_stride, H: tl.constexpr, HKV: tl.constexpr, VALUES: tl.constexpr, HALF: tl.constexpr,
    EPS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, batch, token, channel, mask = _rows(tokens, T, HALF, BLOCK_T, BLOCK_C)
    cos, sin = _tables(cos_ptr, sin_ptr, offsets_ptr, batch, token, channel, mask, HALF, OFFSETS)
    # the gradients of q, k and v are contiguous tensors; dx takes their heads side by side
    D: tl.constexpr = 2 * HALF
    x_ptrs = x_ptr + row * x_stride + channel
    dq_ptrs = dq_ptr + row * H * D + channel
    dk_ptrs = dk_ptr + row * HKV * D + channel
    dx_ptrs = dx_ptr + row * (H + HKV + VALUES) * D + channel
    for head in range(H):
        at = head * D
        _head_backward(x_ptrs + at, dq_ptrs + at, dx_ptrs + at, cos, sin, scale, mask, HALF, EPS)
    x_ptrs += H * D
    dx_ptrs += H * D
    for head in range(HKV):
        at = head * D
        _head_backward(x_ptrs + at, dk_ptrs + at, dx_ptrs + at, cos, sin, scale, mask, HALF, EPS)
    # v passes through untouched; its gradient is copied here to save a launch and a second tensor
    dv_ptrs = dv_ptr + row * VALUES * D + channel
    dx_ptrs += HKV * D
    for half in range(2 * VALUES):
        dv = tl.load(dv_ptrs + half * HALF, mask=mask, other=0.0)
        tl.store(dx_ptrs + half * HALF, dv, mask=mask)


def _launch(
    kernel: Any, tiles: Config, x_BTHD: Tensor, offsets_B: Tensor | None, *args: Any, **sizes: int
) -> None:
    """Launch over the tokens of x; args are the kernel's arguments up to its constants."""
    B, T, _, D = x_BTHD.shape
    options = tiles.choose(x_BTHD, D)
    grid = (cdiv(B * T, options["BLOCK_T"]),)
    options |= sizes | {"HALF": D // 2, "BLOCK_C": next_power_of_2(D // 2)}
    launch(kernel, grid, *args, **options, EPS=EPS, OFFSETS=offsets_B is not None)


def _token_rows(x_BTHD: Tensor) -> Tensor:
    """(B T, H D) with all heads of a token side by side; a view of a packed projection."""
    return as_rows(x_BTHD.flatten(2))


@torch.library.custom_op("nanochat::norm_rope", mutates_args=())
def triton_forward(
    x_BTHD: Tensor, cos: Tensor, sin: Tensor, num_heads: int, offsets_B: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Rotated and normalised: the first num_heads heads of x, and the others; both contiguous."""
    B, T, heads, D = x_BTHD.shape
    if cos.shape[-1] * 2 != D or cos.shape != sin.shape:
        raise ValueError(
            f"tables of shape {tuple(cos.shape)} do not rotate heads of {D} channels; "
            f"make them with rotary_tables(sequence_len, {D}, ...)"
        )
    x = _token_rows(x_BTHD)
    q, k = (
        torch.empty((B, T, n, D), dtype=x.dtype, device=x.device)
        for n in (num_heads, heads - num_heads)
    )
    offsets = cos if offsets_B is None else offsets_B  # a pointer the kernel does not read
    tensors = x, q, k, cos.contiguous(), sin.contiguous(), offsets
    sizes = {"H": num_heads, "HKV": heads - num_heads}
    arguments = *tensors, scale, B * T, T, x.stride(0)
    _launch(forward_kernel, FORWARD, x_BTHD, offsets_B, *arguments, **sizes)
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
    x = _token_rows(x_BTHD)
    # attention returns contiguous gradients of these shapes: nothing is copied in training
    dq, dk = dq.contiguous(), dk.contiguous()
    values = 0 if dv is None else dv.shape[2]
    dv = dq if dv is None else dv.contiguous()
    B, T, heads, D = x_BTHD.shape
    dx = torch.empty((B, T, heads + values, D), dtype=x.dtype, device=x.device)
    offsets = cos if offsets_B is None else offsets_B
    tensors = x, dq, dk, dv, dx, cos.contiguous(), sin.contiguous(), offsets
    sizes = {"H": dq.shape[2], "HKV": heads - dq.shape[2], "VALUES": values}
    arguments = *tensors, scale, B * T, T, x.stride(0)
    _launch(backward_kernel, BACKWARD, x_BTHD, offsets_B, *arguments, **sizes)
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
