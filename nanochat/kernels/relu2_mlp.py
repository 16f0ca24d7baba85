"""The feed-forward network of the block: y = relu(x W_up^T)^2 W_down^T.

Shapes  x: (..., D); w_up: (F, D); w_down: (D, F); y: (..., D). F = 4 D in the model.
Dtypes  float32, bfloat16, float16; products accumulate in float32.
Saves   x and, in the reference, three tensors of F a token (before, after relu, after the square).
Cost    4 D F flops a token.
Source  ReLU^2: D. So et al., Primer, arXiv:2109.08668.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import Workload


def reference(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """relu(x @ w_up.T)^2 @ w_down.T."""
    return F.linear(F.linear(x, w_up).relu().square(), w_down)


def cost(x: Tensor, w_up: Tensor, w_down: Tensor) -> Cost:
    """Forward: two matrix products; x, both weights and y once, the activation written and read."""
    tokens = x.numel() // x.shape[-1]
    elements = 2 * x.numel() + w_up.numel() + w_down.numel() + 2 * tokens * w_up.shape[0]
    return Cost(4 * tokens * w_up.numel(), elements * x.element_size())


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One token, odd sizes, then d12's width."""
    for rows, width, hidden in ((1, 8, 16), (5, 40, 72), (64, 768, 3072)):
        yield (
            torch.randn(rows, width, device=device, dtype=dtype),
            torch.randn(hidden, width, device=device, dtype=dtype) * width**-0.5,
            torch.randn(width, hidden, device=device, dtype=dtype) * hidden**-0.5,
        )


def workload(
    w: Workload, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The network of one block."""
    return (
        torch.randn(w.tokens, w.width, device=device, dtype=dtype),
        torch.randn(4 * w.width, w.width, device=device, dtype=dtype) * w.width**-0.5,
        torch.randn(w.width, 4 * w.width, device=device, dtype=dtype) * (4 * w.width) ** -0.5,
    )


relu2_mlp = Op("relu2_mlp", reference, cost, examples, workload)
