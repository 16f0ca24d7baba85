"""RMSNorm without weights, alone and fused with the residual addition before it.

    rms_norm(x)           y = x / sqrt(mean(x^2) + eps)
    add_rms_norm(x, d)    x' = x + d,  y = rms_norm(x')

Shapes  x, d, y: (..., D), normalised over D.
Dtypes  float32, bfloat16, float16; statistics in float32.
Saves   x (reference: what autograd keeps).
Cost    rms_norm reads and writes 2 D elements a row; add_rms_norm 4 D.
Source  B. Zhang and R. Sennrich, arXiv:1910.07467.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.registry import Cost, Op

# explicit because the default of F.rms_norm depends on the dtype (7.8e-3 in bfloat16)
EPS = 1e-6


def reference(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + EPS) over the last axis."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def add_reference(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(x + delta, rms_norm(x + delta))."""
    x = x + delta
    return x, F.rms_norm(x, (x.shape[-1],), eps=EPS)


def cost(x: Tensor) -> Cost:
    """Forward: one read, one write."""
    return Cost(4 * x.numel(), 2 * x.numel() * x.element_size())


def add_cost(x: Tensor, delta: Tensor) -> Cost:
    """Forward: two reads, two writes."""
    return Cost(5 * x.numel(), 4 * x.numel() * x.element_size())


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor]]:
    """One row, odd rows and widths, then the d12 model's width."""
    for shape in ((1, 8), (3, 5, 96), (7, 1), (2, 33, 768)):
        yield (torch.randn(shape, device=device, dtype=dtype),)


def add_examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """As `examples`, with a second operand."""
    for (x,) in examples(device, dtype):
        yield x, torch.randn_like(x)


rms_norm = Op("rms_norm", reference, cost, examples)
add_rms_norm = Op("add_rms_norm", add_reference, add_cost, add_examples)
