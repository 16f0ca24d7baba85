"""Causal attention with grouped heads, an optional window and an optional key/value cache.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s   over  t - window < s <= t

Shapes  q_BTHD, y: (B, T, H, D); k_BSHD, v_BSHD: (B, S, Hkv, D), H a multiple of Hkv.
        The queries are the last T valid positions: of S, or of kv_lengths_B (B,) where given.
Dtypes  float32, bfloat16, float16; softmax in float32.
Saves   q, k, v and the scores (reference); q, k, v, y and the row sums (sdpa).
Cost    4 D flops for each visible pair of positions and each head.
Source  arXiv:1706.03762; grouped queries arXiv:2305.13245; windows arXiv:2004.05150.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import HEAD_DIM, Workload


def visible(
    T: int, S: int, device: torch.device, window: int | None, kv_lengths_B: Tensor | None
) -> Tensor:
    """Mask (B or 1, 1, T, S): True where the query may look."""
    ends = torch.full((1,), S, device=device) if kv_lengths_B is None else kv_lengths_B
    query = ends[:, None] - T + torch.arange(T, device=device)  # (B, T) positions
    distance = query[:, None, :, None] - torch.arange(S, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def reference(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    window: int | None = None,
    kv_lengths_B: Tensor | None = None,
) -> Tensor:
    """The definition: all scores in memory."""
    T, S, groups = q_BTHD.shape[1], k_BSHD.shape[1], q_BTHD.shape[2] // k_BSHD.shape[2]
    q = q_BTHD.transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k_BSHD, v_BSHD))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    mask = visible(T, S, q.device, window, kv_lengths_B)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def sdpa(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    window: int | None = None,
    kv_lengths_B: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention; a mask only where the shape demands one."""
    T, S = q_BTHD.shape[1], k_BSHD.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
    gqa = q.shape[1] != k.shape[1]
    if window is None and kv_lengths_B is None and T == S:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    else:
        mask = visible(T, S, q.device, window, kv_lengths_B)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return y.transpose(1, 2)


def cost(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    window: int | None = None,
    kv_lengths_B: Tensor | None = None,
) -> Cost:
    """Forward: visible pairs only; q, k, v read and y written once."""
    T, S = q_BTHD.shape[1], k_BSHD.shape[1]
    span = S if window is None else min(window, S)
    pairs = sum(min(S - T + t + 1, span) for t in range(T))
    elements = 2 * q_BTHD.numel() + k_BSHD.numel() + v_BSHD.numel()
    heads = q_BTHD.shape[0] * q_BTHD.shape[2] * q_BTHD.shape[3]
    return Cost(4 * heads * pairs, elements * q_BTHD.element_size())


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """One token, grouped heads, a window, a cache of unequal lengths, then d12's heads."""
    for B, T, S, H, Hkv, D, window, lengths in (
        (1, 1, 1, 1, 1, 8, None, None),
        (2, 17, 17, 4, 2, 64, None, None),
        (2, 19, 19, 2, 1, 32, 7, None),
        (2, 3, 16, 4, 2, 32, None, (9, 16)),
        (1, 64, 64, 6, 6, 128, None, None),
    ):
        yield (
            torch.randn(B, T, H, D, device=device, dtype=dtype),
            torch.randn(B, S, Hkv, D, device=device, dtype=dtype),
            torch.randn(B, S, Hkv, D, device=device, dtype=dtype),
            window,
            None if lengths is None else torch.tensor(lengths, device=device),
        )


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values of whole sequences."""
    length = w.tokens // w.batch
    return tuple(
        torch.randn(w.batch, length, heads, HEAD_DIM, device=device, dtype=dtype)
        for heads in (w.heads, w.num_kv_heads, w.num_kv_heads)
    )


attention = Op("attention", reference, cost, examples, workload)
attention.add("sdpa", sdpa)
