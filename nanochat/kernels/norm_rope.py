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

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.launch import needs_triton, worth_compiling
from nanochat.kernels.norm_rope_kernels import triton_forward
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


def triton_norm_rope(
    x_BTHD: Tensor, cos: Tensor, sin: Tensor, offsets_B: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """`reference` in one launch each way."""
    return triton_forward(x_BTHD, cos, sin, x_BTHD.shape[2], offsets_B, scale)[0]


def cost(x_BTHD: Tensor, cos: Tensor, *args: Any, **kwargs: Any) -> Cost:
    """x and y; x, dy and dx. Each time the rows of both tables that T positions need."""
    size, T = x_BTHD.numel(), x_BTHD.shape[1]
    moved, tables = size * x_BTHD.element_size(), 2 * T * cos.shape[-1] * cos.element_size()
    return Cost(14 * size, 2 * moved + tables, Cost(20 * size, 3 * moved + tables))


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
