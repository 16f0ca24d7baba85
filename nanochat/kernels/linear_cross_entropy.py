"""Cross-entropy of softcapped logits, from hidden states and the head's weight.

    z = softcap tanh(x W^T / softcap);   loss = lse - z[target] + z_loss lse^2,  lse = log sum exp z
    dlogits = (p (1 + 2 z_loss lse) - [target]) (1 - (z / softcap)^2),  p = exp(z - lse)

    |z| <= softcap, so sum exp(z - softcap) needs no running maximum: one pass, any order.

Shapes  x: (..., D); weight: (V, D), its first vocab_size rows real and the rest padding;
        targets: (...) of int64, `ignore_index` where there is none.
Dtypes  float32, bfloat16, float16; logits, softcap and loss in float32, dW summed in float32.
Saves   the logits (reference); dx and dW, computed in the forward pass chunk by chunk (triton);
        x, weight and targets alone, everything twice (triton_min_memory, and reduction "none").
Cost    2 D V flops a token, three times that with the backward pass, four if logits are recomputed.
Error   zero valid targets give a loss of 0, not NaN.
Source  softcap: Gemma 2, arXiv:2408.00118, section 2; chunks: Liger Kernel, arXiv:2410.10989;
        z-loss: PaLM, arXiv:2204.02311, section 5.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.launch import config, launch, needs_triton, worth_compiling
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
    z_loss: float = 0.0,
) -> Tensor:
    """Loss of every target ("none", shape of targets), their sum, or their mean over the valid."""
    logits = softcapped_logits(x, weight, softcap, vocab_size or weight.shape[0])
    loss = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(targets.shape)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(dim=-1).square() * (targets != IGNORE_INDEX)
    return _reduce(loss, targets, reduction)


def _reduce(loss: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; choose one of {REDUCTIONS}")
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


@triton.jit
def loss_kernel(
    logits_ptr, targets_ptr, scales_ptr, losses_ptr, softcap, z_loss, row_stride,
    V: tl.constexpr, PADDED: tl.constexpr, IGNORED: tl.constexpr,
    GRADIENTS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one row of logits; with GRADIENTS the row becomes its dlogits, times its scale."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    valid = target != IGNORED
    # read before the row is overwritten: the sum below is a barrier between the two
    at_target = tl.load(logits_ptr + tl.where(valid, target, 0)).to(tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
        # tanh - 1 without cancellation where it matters, near the cap
        below = -2.0 * softcap / (1.0 + tl.exp(2.0 * x / softcap))
        sums += tl.where(column < V, tl.exp(below), 0.0)
    total = tl.sum(sums, axis=0)
    lse = tl.log(total) + softcap
    z = softcap - 2.0 * softcap / (1.0 + tl.exp(2.0 * at_target / softcap))
    loss = lse - z + z_loss * lse * lse
    tl.store(losses_ptr + row, tl.where(valid, loss, 0.0))
    if GRADIENTS:
        scale = 1.0
        if SCALED:
            scale = tl.load(scales_ptr + row)
        scale = tl.where(valid, scale, 0.0)
        weight = (1.0 + 2.0 * z_loss * lse) / total
        for start in range(0, PADDED, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / softcap))
            d = weight * tl.exp(softcap * tanh - softcap) - tl.where(column == target, 1.0, 0.0)
            d = tl.where(column < V, scale * d * (1.0 - tanh * tanh), 0.0)
            tl.store(logits_ptr + column, d.to(logits_ptr.dtype.element_ty), mask=column < PADDED)


def chunk_rows(x: Tensor) -> int:
    """Rows whose logits are in memory at once."""
    return config("linear_cross_entropy.chunk", x, x.shape[-1])["rows"]


def extra_bytes(tokens: int, D: int, V: int, rows: int, element_size: int) -> int:
    """Memory of a call with gradients beyond its inputs: logits of a chunk, dx, dW, losses."""
    return rows * V * element_size + tokens * D * element_size + V * D * 4 + tokens * 4


def _accumulate(dw: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """dw += dlogits^T x, summed in float32."""
    if x.dtype == torch.float32:
        dw.addmm_(dlogits.mT, x)
    elif x.device.type == "cuda":  # cuBLAS multiplies 16-bit matrices into a float32 one
        torch.addmm(dw, dlogits.mT, x, out_dtype=torch.float32, out=dw)
    else:
        dw.addmm_(dlogits.mT.float(), x.float())


@torch.library.custom_op("nanochat::linear_cross_entropy", mutates_args=())
def chunked(
    x_ND: Tensor,
    weight: Tensor,
    targets_N: Tensor,
    scales_N: Tensor | None,
    softcap: float,
    vocab_size: int,
    z_loss: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,) in float32; with `gradients` also dx and dW of the sum of scale * loss, else
    empty tensors. A scale of None is 1."""
    (N, D), V = x_ND.shape, weight.shape[0]
    rows = min(chunk_rows(x_ND), max(N, 1))
    losses = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    dx = torch.empty((N, D) if gradients else (0,), dtype=x_ND.dtype, device=x_ND.device)
    dw = torch.zeros((V, D) if gradients else (0,), dtype=torch.float32, device=x_ND.device)
    buffer = torch.empty((rows, V), dtype=x_ND.dtype, device=x_ND.device)
    options = config("linear_cross_entropy.loss", x_ND, V)
    for start in range(0, N, rows):
        x = x_ND[start : start + rows]
        logits = torch.mm(x, weight.mT, out=buffer[: len(x)])
        part = slice(start, start + len(x))
        scales = losses if scales_N is None else scales_N
        launch(
            loss_kernel, (len(x),), logits, targets_N[part], scales[part], losses[part],
            softcap, z_loss, V, V=vocab_size, PADDED=V, IGNORED=IGNORE_INDEX, GRADIENTS=gradients,
            SCALED=scales_N is not None, **options,
        )  # fmt: skip
        if gradients:
            torch.mm(logits, weight, out=dx[part])
            _accumulate(dw, logits, x)
    return losses, dx, dw


@chunked.register_fake
def _(
    x_ND: Tensor, weight: Tensor, targets_N: Tensor, scales_N: Tensor | None, softcap: float,
    vocab_size: int, z_loss: float, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    losses = x_ND.new_empty(x_ND.shape[0], dtype=torch.float32)
    dx = torch.empty_like(x_ND) if gradients else x_ND.new_empty(0)
    shape = weight.shape if gradients else (0,)
    return losses, dx, x_ND.new_empty(shape, dtype=torch.float32)


class SumLoss(torch.autograd.Function):
    """Sum of the losses; its gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(ctx, x_ND, weight, targets_N, softcap, vocab_size, z_loss, gradients):
        losses, dx, dw = chunked(
            x_ND, weight, targets_N, None, softcap, vocab_size, z_loss, gradients
        )
        ctx.save_for_backward(dx, dw)
        ctx.dtype = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, dw = ctx.saved_tensors
        # multiplied in float32: a 16-bit 1 / tokens would scale every gradient wrongly
        dx, dw = (dx.float() * grad).to(dx.dtype), (dw * grad).to(ctx.dtype)
        return dx, dw, None, None, None, None, None


class EachLoss(torch.autograd.Function):
    """The loss of each row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, x_ND, weight, targets_N, softcap, vocab_size, z_loss):
        ctx.save_for_backward(x_ND, weight, targets_N)
        ctx.options = softcap, vocab_size, z_loss
        return chunked(x_ND, weight, targets_N, None, softcap, vocab_size, z_loss, False)[0]

    @staticmethod
    def backward(ctx, grad_N):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, weight, targets_N = ctx.saved_tensors
        _, dx, dw = chunked(x_ND, weight, targets_N, grad_N.contiguous(), *ctx.options, True)
        return dx, dw.to(weight.dtype), None, None, None, None


def triton_min_memory(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 15.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """`reference` in chunks that keep nothing: a third more flops for dx and dW until needed."""
    options = softcap, vocab_size or weight.shape[0], z_loss
    losses = EachLoss.apply(x.flatten(0, -2), weight, targets.flatten(), *options)
    return _reduce(losses.view(targets.shape), targets, reduction)


def triton_chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 15.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """`reference` in chunks, gradients in the forward pass."""
    if reduction == "none":
        return triton_min_memory(x, weight, targets, softcap, vocab_size, reduction, z_loss)
    options = softcap, vocab_size or weight.shape[0], z_loss
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total = SumLoss.apply(x.flatten(0, -2), weight, targets.flatten(), *options, gradients)
    count = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / count if reduction == "mean" else _reduce(total, targets, reduction)


def cost(x: Tensor, weight: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Cost:
    """Forward: one product; x and weight read once, no logits in memory."""
    return Cost(
        2 * targets.numel() * weight.numel(), (x.numel() + weight.numel()) * x.element_size()
    )


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Tiny, padded vocabulary with ignored targets, all ignored, z-loss and sums, d12's width."""
    for rows, width, vocab, real, ignored, reduction, z_loss in (
        (1, 8, 16, 16, 0.0, "mean", 0.0),
        (13, 40, 128, 101, 0.3, "mean", 0.0),
        (5, 16, 64, 60, 1.0, "mean", 0.0),
        (9, 24, 256, 200, 0.2, "sum", 1e-2),
        (9, 24, 256, 200, 0.2, "none", 1e-2),
        (64, 768, 1024, 1000, 0.1, "mean", 0.0),
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


def workload(w: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The last hidden states, the head and the next tokens."""
    return (
        torch.randn(w.tokens, w.width, device=device, dtype=dtype),
        torch.randn(w.vocab_size, w.width, device=device, dtype=dtype) * w.width**-0.5,
        torch.randint(w.vocab_size, (w.tokens,), device=device),
    )


def recomputes(device: torch.device, dtype: torch.dtype) -> str:
    """Reason against the form that recomputes unasked."""
    return "computes the logits twice; ask for it where memory is short"


linear_cross_entropy = Op("linear_cross_entropy", reference, cost, examples, workload)
linear_cross_entropy.add("triton_min_memory", triton_min_memory, needs_triton, recomputes)
linear_cross_entropy.add("triton", triton_chunked, needs_triton, worth_compiling)
