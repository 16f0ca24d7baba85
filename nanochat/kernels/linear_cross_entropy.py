"""Cross-entropy of softcapped logits, from hidden states and the head's weight.

    z = softcap tanh(x W^T / softcap);   loss = lse - z[target] + z_loss lse^2,  lse = log sum exp z
    dlogits = (p (1 + 2 z_loss lse) - [target]) (1 - (z / softcap)^2),  p = exp(z - lse)

Shapes  x: (..., D); weight: (V, D), its first vocab_size rows real and the rest padding;
        targets: (...) of integers, ignore_index where there is none.
Dtypes  float32, bfloat16, float16; logits, softcap and loss in float32, dW summed in float32;
        dx of a sum or mean is rounded again when the gradient of the loss multiplies it (triton).
Saves   the logits (reference); dx and dW, computed in the forward pass chunk by chunk (triton);
        x, weight and targets alone, the logits again in the backward pass (triton_min_memory, and
        reduction "none", whose gradients wait for a scale of each token).
Cost    2 D V flops a token, three times that with the backward pass, four if logits are recomputed.
Error   zero valid targets give a loss of 0, not NaN; a softcap above 40 needs the reference.
Source  softcap: Gemma 2, arXiv:2408.00118, section 2; z-loss: PaLM, arXiv:2204.02311, section 5;
        the chunks are in
        linear_cross_entropy_chunks.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.launch import needs_triton, worth_compiling
from nanochat.kernels.linear_cross_entropy_chunks import IGNORE_INDEX, chunked, times
from nanochat.kernels.linear_cross_entropy_kernels import MAX_SOFTCAP
from nanochat.kernels.registry import Cost, Op
from nanochat.kernels.workloads import Workload

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
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Loss of every target ("none", shape of targets), their sum, or their mean over the valid."""
    logits = softcapped_logits(x, weight, softcap, vocab_size or weight.shape[0])
    loss = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none"
    ).view(targets.shape)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(dim=-1).square() * (targets != ignore_index)
    return _reduce(loss, targets, reduction, ignore_index)


def _reduce(loss: Tensor, targets: Tensor, reduction: str, ignore_index: int) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; choose one of {REDUCTIONS}")
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (targets != ignore_index).sum().clamp(min=1)


def _checked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    vocab_size: int | None,
    z_loss: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, float, int, float, int]:
    """The arguments, x as rows and targets as one; ValueError if one is wrong.

    A kernel would read past the end of what is too short.
    """
    V, D = weight.shape
    if x.shape != (*targets.shape, D):
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit targets {tuple(targets.shape)} and weight "
            f"{(V, D)}; give it shape {(*targets.shape, D)}"
        )
    if vocab_size is not None and not 0 < vocab_size <= V:
        raise ValueError(f"vocab_size {vocab_size} is not in 1..{V}, the rows of the weight")
    if not 0 < softcap <= MAX_SOFTCAP:
        raise ValueError(
            f"softcap {softcap} is not in (0, {MAX_SOFTCAP}], where sums of exp(z - softcap) fit "
            "float32; use --kernels=linear_cross_entropy=reference"
        )
    sizes = softcap, vocab_size or V, z_loss, ignore_index
    return x.flatten(0, -2), weight, targets.flatten(), *sizes


class SumLoss(torch.autograd.Function):
    """Sum of the losses; its gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(ctx, x_ND, weight, targets_N, softcap, vocab_size, z_loss, ignored, gradients):
        # of the sum, so no scale for each row is needed and the gradients need not wait for one
        losses, dx, dw = chunked(
            x_ND, weight, targets_N, None, softcap, vocab_size, z_loss, ignored, gradients, False
        )
        ctx.save_for_backward(dx, dw)
        ctx.dtype = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        # the loss is a number: its gradient multiplies what the forward pass computed
        dx, dw = ctx.saved_tensors
        dx, dw = times(dx, grad, dx.dtype), times(dw, grad, ctx.dtype)
        return dx, dw, None, None, None, None, None, None


class EachLoss(torch.autograd.Function):
    """The loss of each row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, x_ND, weight, targets_N, softcap, vocab_size, z_loss, ignored, small):
        ctx.save_for_backward(x_ND, weight, targets_N)
        ctx.options = softcap, vocab_size, z_loss, ignored
        ctx.small = small
        return chunked(x_ND, weight, targets_N, None, *ctx.options, False, small)[0]

    @staticmethod
    def backward(ctx, grad_N):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, weight, targets_N = ctx.saved_tensors
        # now the scale of each row is known
        _, dx, dw = chunked(x_ND, weight, targets_N, grad_N, *ctx.options, True, ctx.small)
        return dx, dw.to(weight.dtype), None, None, None, None, None, None


def triton_min_memory(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 15.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """`reference` in small chunks that keep nothing: dx and dW for a third more flops."""
    inputs = _checked(x, weight, targets, softcap, vocab_size, z_loss, ignore_index)
    losses = EachLoss.apply(*inputs, True)
    return _reduce(losses.view(targets.shape), targets, reduction, ignore_index)


def triton_chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 15.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """`reference` in chunks, with the gradients in the forward pass unless reduction is "none"."""
    inputs = _checked(x, weight, targets, softcap, vocab_size, z_loss, ignore_index)
    if reduction == "none":
        return EachLoss.apply(*inputs, False).view(targets.shape)
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _reduce(SumLoss.apply(*inputs, gradients), targets, reduction, ignore_index)


def cost(x: Tensor, weight: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Cost:
    """One product, two backward; x and weight in, their gradients out, and no logits in memory."""
    flops = 2 * targets.numel() * weight.numel()
    moved = (x.numel() + weight.numel()) * x.element_size()
    return Cost(flops, moved, Cost(2 * flops, 2 * moved))


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Tiny; padded vocabulary, ignored targets, all ignored; z-loss, sums, losses; a vocabulary of
    several blocks; d12's width; states by columns and targets of a wider tensor."""
    for rows, width, vocab, real, ignored, reduction, z_loss in (
        (1, 8, 16, 16, 0.0, "mean", 0.0),
        (13, 40, 128, 101, 0.3, "mean", 0.0),
        (5, 16, 64, 60, 1.0, "mean", 0.0),
        (9, 24, 256, 200, 0.2, "sum", 1e-2),
        (9, 24, 256, 200, 0.2, "none", 1e-2),
        (9, 16, 16_512, 16_400, 0.1, "sum", 0.0),
        (16, 768, 1024, 1000, 0.1, "mean", 0.0),
    ):
        targets = torch.randint(real, (rows,), device=device)
        targets[torch.rand(rows, device=device) < ignored] = IGNORE_INDEX
        yield (
            torch.randn(rows, width, device=device, dtype=dtype),
            torch.randn(vocab, width, device=device, dtype=dtype),
            targets,
            15.0,
            real,
            reduction,
            z_loss,
        )
    states = torch.randn(24, 10, device=device, dtype=dtype).mT
    weight = torch.randn(128, 24, device=device, dtype=dtype)
    yield states, weight, torch.randint(100, (10, 3), device=device)[:, 1], 15.0, 100, "mean", 0.0


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The last hidden states, the head and the next tokens."""
    return (
        torch.randn(w.tokens, w.width, device=device, dtype=dtype),
        torch.randn(w.vocab_size, w.width, device=device, dtype=dtype) * w.width**-0.5,
        torch.randint(w.vocab_size, (w.tokens,), device=device),
    )


def recomputes(device: torch.device, dtype: torch.dtype) -> str:
    """Reason why `auto` does not choose the form that recomputes."""
    return "computes the logits twice; ask for it where memory is short"


linear_cross_entropy = Op(
    "linear_cross_entropy", reference, cost, examples, workload,
    summary="logits exist for a chunk of rows only; `triton` computes dx and dW in the forward "
    "pass, `triton_min_memory` computes the logits twice",
)  # fmt: skip
linear_cross_entropy.add("triton_min_memory", triton_min_memory, needs_triton, recomputes)
linear_cross_entropy.add("triton", triton_chunked, needs_triton, worth_compiling)
