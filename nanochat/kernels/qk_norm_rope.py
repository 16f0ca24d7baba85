"""Rotary embedding, then RMSNorm, of the query and key heads inside a packed QKV projection.

    (x1, x2) halves of a head;  r1 = x1 cos + x2 sin,  r2 = -x1 sin + x2 cos
    y = r / sqrt(mean(r^2) + eps)

Shapes  qkv_BTE: (B, T, (H + 2 Hkv) D), heads in the order q, k, v; cos, sin: (S, D/2) tables,
        S above the largest position; offsets_B: (B,) position of each row's first token, or None
        for 0. Returns q_BTHD (B, T, H, D), k_BTHD (B, T, Hkv, D), v_BTHD (a view of qkv).
Dtypes  float32, bfloat16, float16; tables in float32, rotation and statistics in float32.
Saves   qkv (reference: what autograd keeps).
Cost    reads and writes T (H + Hkv) D elements; v is not touched.
Source  RoPE arXiv:2104.09864 (rotation by -theta, halves not interleaved);
        QK-norm arXiv:2010.04245.
        The rotation comes first: rounded tables are not exactly orthonormal, the norm is.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.rms_norm import EPS
from nanochat.kernels.workloads import HEAD_DIM, Workload


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
    qkv_BTE: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    offsets_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k rotated and normalised, v as it is."""
    B, T, _ = qkv_BTE.shape
    heads = qkv_BTE.view(B, T, num_heads + 2 * num_kv_heads, 2 * cos.shape[-1])
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
    positions = torch.arange(T, device=cos.device)
    if offsets_B is not None:
        positions = positions + offsets_B[:, None]  # (B, T)
    cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
    x1, x2 = qk.to(torch.promote_types(qk.dtype, cos.dtype)).chunk(2, dim=-1)
    rotated = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
    qk = F.rms_norm(rotated, (rotated.shape[-1],), eps=EPS).to(qkv_BTE.dtype)
    q, k = qk.split((num_heads, num_kv_heads), dim=2)
    return q, k, v


def cost(
    qkv_BTE: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    offsets_B: Tensor | None = None,
) -> Cost:
    """Forward: q and k read once and written once."""
    elements = qkv_BTE.shape[0] * qkv_BTE.shape[1] * (num_heads + num_kv_heads) * 2 * cos.shape[-1]
    return Cost(14 * elements, 2 * elements * qkv_BTE.element_size())


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """One head, grouped heads with offsets, then d12's heads."""
    for B, T, H, Hkv, D, offset in (
        (1, 1, 1, 1, 8, 0),
        (2, 17, 4, 2, 64, 5),
        (2, 33, 6, 6, 128, 0),
    ):
        qkv = torch.randn(B, T, (H + 2 * Hkv) * D, device=device, dtype=dtype)
        cos, sin = rotary_tables(T + offset + B, D, 10_000.0, device)
        offsets = torch.arange(B, device=device) + offset if offset else None
        yield qkv, cos, sin, H, Hkv, offsets


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """A packed projection of whole sequences."""
    length, channels = w.tokens // w.batch, (w.heads + 2 * w.num_kv_heads) * HEAD_DIM
    qkv_BTE = torch.randn(w.batch, length, channels, device=device, dtype=dtype)
    cos, sin = rotary_tables(length, HEAD_DIM, 10_000.0, device)
    return qkv_BTE, cos, sin, w.heads, w.num_kv_heads


qk_norm_rope = Op("qk_norm_rope", reference, cost, examples, workload)
