"""Cross-entropy of softcapped logits, from hidden states and the head's weight.

    z = softcap * tanh(x W^T / softcap);   loss = logsumexp(z) - z[target]

Shapes  x: (..., D); weight: (V, D), its first vocab_size rows real and the rest padding;
        targets: (...) of int64, `ignore_index` where there is none.
Dtypes  float32, bfloat16, float16; logits, softcap and loss in float32.
Saves   the logits (reference).
Cost    2 D V flops a token.
Error   zero valid targets give a loss of 0, not NaN.
Source  softcap: Gemma 2, arXiv:2408.00118, section 2.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import Workload

IGNORE_INDEX = -1
REDUCTIONS = ("none", "mean", "sum")


def softcapped_logits(x: Tensor, weight: Tensor, softcap: float, vocab_size: int) -> Tensor:
    """softcap * tanh(x W^T / softcap) of the first vocab_size rows of W, in at least float32."""
    logits = F.linear(x, weight)[..., :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap)


def reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 15.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Loss of every target ("none", shape of targets), their sum, or their mean over the valid."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; choose one of {REDUCTIONS}")
    logits = softcapped_logits(x, weight, softcap, vocab_size or weight.shape[0])
    loss = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    if reduction == "none":
        return loss.view(targets.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (targets != IGNORE_INDEX).sum().clamp(min=1)


def cost(x: Tensor, weight: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Cost:
    """Forward: one product; x and weight read once, no logits in memory."""
    return Cost(
        2 * targets.numel() * weight.numel(), (x.numel() + weight.numel()) * x.element_size()
    )


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Tiny, padded vocabulary with ignored targets, all ignored, then d12's width."""
    for rows, width, vocab, real, ignored in (
        (1, 8, 16, 16, 0.0),
        (13, 40, 128, 101, 0.3),
        (5, 16, 64, 60, 1.0),
        (64, 768, 1024, 1000, 0.1),
    ):
        targets = torch.randint(real, (rows,), device=device)
        targets[torch.rand(rows, device=device) < ignored] = IGNORE_INDEX
        yield (
            torch.randn(rows, width, device=device, dtype=dtype),
            torch.randn(vocab, width, device=device, dtype=dtype),
            targets,
            15.0,
            real,
        )


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The last hidden states, the head and the next tokens."""
    return (
        torch.randn(w.tokens, w.width, device=device, dtype=dtype),
        torch.randn(w.vocab_size, w.width, device=device, dtype=dtype) * w.width**-0.5,
        torch.randint(w.vocab_size, (w.tokens,), device=device),
    )


linear_cross_entropy = Op("linear_cross_entropy", reference, cost, examples, workload)
