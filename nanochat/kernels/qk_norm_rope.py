"""Rotary embedding, then RMSNorm, of the query and key heads inside a packed QKV projection.

    q, k = norm_rope(their heads), v as it is: one launch reads the projection in place, and one
    writes its whole gradient.

Shapes  qkv_BTE: (B, T, (H + 2 Hkv) D), heads in the order q, k, v; the rest as in norm_rope.
        Returns q_BTHD (B, T, H, D), k_BTHD (B, T, Hkv, D), v_BTHD (a view of qkv).
Dtypes  float32, bfloat16, float16; tables in float32 and constant, arithmetic in float32.
Saves   qkv alone.
Cost    reads and writes B T (H + Hkv) D elements, v is not touched; backward reads twice that,
        writes once, and copies the gradient of v.
Source  as norm_rope.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanochat.kernels import norm_rope
from nanochat.kernels.launch import needs_triton, worth_compiling
from nanochat.kernels.norm_rope import rotary_tables
from nanochat.kernels.norm_rope_kernels import triton_backward, triton_forward
from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import HEAD_DIM, Workload


def reference(
    qkv_BTE: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    offsets_B: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k rotated and normalised, v as it is."""
    heads = qkv_BTE.unflatten(-1, (num_heads + 2 * num_kv_heads, 2 * cos.shape[-1]))
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
    q, k = norm_rope.reference(qk, cos, sin, offsets_B, scale).split((num_heads, num_kv_heads), 2)
    return q, k, v


class PackedNormRope(torch.autograd.Function):
    """q, k, v of a packed projection; one packed gradient back."""

    @staticmethod
    def forward(ctx, qkv_BTE, cos, sin, num_heads, num_kv_heads, offsets_B, scale):
        heads = qkv_BTE.unflatten(-1, (num_heads + 2 * num_kv_heads, 2 * cos.shape[-1]))
        qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
        # views: nothing is copied, the kernel steps from token to token over the heads of v
        ctx.save_for_backward(qkv_BTE, cos, sin, offsets_B)
        ctx.scale, ctx.split = scale, (num_heads + num_kv_heads, num_kv_heads)
        q, k = triton_forward(qk, cos, sin, num_heads, offsets_B, scale)
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv_BTE, cos, sin, offsets_B = ctx.saved_tensors
        qk = qkv_BTE.unflatten(-1, (sum(ctx.split), 2 * cos.shape[-1]))[:, :, : ctx.split[0]]
        # one launch writes the gradients of q, k and v where the projection's backward reads them
        dqkv = triton_backward(dq, dk, dv, qk, cos, sin, offsets_B, ctx.scale)
        return dqkv.flatten(2), None, None, None, None, None, None


def triton_qk_norm_rope(
    qkv_BTE: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    offsets_B: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference` in one launch each way; v is a view of qkv."""
    return PackedNormRope.apply(qkv_BTE, cos, sin, num_heads, num_kv_heads, offsets_B, scale)


def cost(
    qkv_BTE: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, *args: Any
) -> Cost:
    """Of the heads of q and k as in norm_rope; the gradient of v is read and written besides."""
    heads = qkv_BTE.unflatten(-1, (num_heads + 2 * num_kv_heads, 2 * cos.shape[-1]))
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
    of_qk = norm_rope.cost(qk, cos)
    assert of_qk.backward is not None
    moved = of_qk.backward.bytes + 2 * v.numel() * v.element_size()
    return Cost(of_qk.flops, of_qk.bytes, Cost(of_qk.backward.flops, moved))


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """One head, grouped heads with offsets and a scale, a strided batch, then d12's heads."""
    for B, T, H, Hkv, D, offset, scale in (
        (1, 1, 1, 1, 8, 0, 1.0),
        (2, 17, 4, 2, 64, 5, 1.2),
        (3, 5, 3, 1, 24, 0, 1.0),
        (2, 33, 6, 6, 128, 0, 1.0),
    ):
        qkv = torch.randn(B, T + 2, (H + 2 * Hkv) * D, device=device, dtype=dtype)[:, 1:-1]
        cos, sin = rotary_tables(T + offset + B, D, 10_000.0, device)
        offsets = torch.arange(B, device=device) + offset if offset else None
        yield qkv, cos, sin, H, Hkv, offsets, scale


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """A packed projection of whole sequences."""
    length, channels = w.tokens // w.batch, (w.heads + 2 * w.num_kv_heads) * HEAD_DIM
    qkv_BTE = torch.randn(w.batch, length, channels, device=device, dtype=dtype)
    cos, sin = rotary_tables(length, HEAD_DIM, 10_000.0, device)
    return qkv_BTE, cos, sin, w.heads, w.num_kv_heads


qk_norm_rope = Op(
    "qk_norm_rope", reference, cost, examples, workload,
    summary="reads the packed QKV product in place, writes what attention reads; backward writes "
    "one packed gradient",
)  # fmt: skip
qk_norm_rope.add("triton", triton_qk_norm_rope, needs_triton, worth_compiling)
