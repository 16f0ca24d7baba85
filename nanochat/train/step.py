"""One optimizer step: micro-batches, backward, gradient reduction, clipping, update.

The loss is normalised by the number of valid targets of the whole step, over all micro-batches and
ranks, so that a batch with few targets does not weigh more than its tokens.

Example: two ranks with two micro-batches each, of 100, 60, 100 and 40 valid targets. `valid` is 300
everywhere, each micro-batch adds (sum of its nats) / 300, and a token counts 1/300 wherever it is.
Means of means would give the tokens of the last micro-batch 1/160, those of the first 1/400.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.common import Runtime
from nanochat.kernels.linear_cross_entropy import IGNORE_INDEX
from nanochat.optim.sharding import BucketOptimizer


class StepResult(NamedTuple):
    """Zero-dimensional tensors on the device; reading them waits for the step."""

    loss: Tensor  # nats per valid target, mean over all ranks
    grad_norm: Tensor  # of the whole gradient, before clipping


def cross_entropy_sum(model: torch.nn.Module, micro_batch: tuple[Tensor, ...]) -> Tensor:
    """Nats of all targets together."""
    inputs, targets = micro_batch
    return model(inputs, targets, loss_reduction="sum")


def train_step(
    model: torch.nn.Module,
    optimizers: Sequence[BucketOptimizer],
    micro_batches: Sequence[tuple[Any, ...]],
    runtime: Runtime,
    grad_clip: float = 0.0,
    loss_sum: Callable[[torch.nn.Module, Any], Tensor] = cross_entropy_sum,
) -> StepResult:
    """Train on micro-batches (inputs, targets, ...) and update the parameters once.

    grad_clip  largest global gradient norm; 0 leaves the gradient as it is.
    loss_sum   of the valid targets of one micro-batch.
    """
    # how many targets the whole step has: known before the first backward, from the data alone
    valid = torch.stack([(batch[1] != IGNORE_INDEX).sum() for batch in micro_batches]).sum()
    valid = runtime.all_reduce(valid.float()).clamp(min=1)
    total = torch.zeros((), device=runtime.device)
    for batch in micro_batches:
        loss = loss_sum(model, batch) / valid
        # the optimizers average over ranks, and `valid` already counts all of them
        (loss * runtime.world_size).backward()
        total += loss.detach()
    # every rank then holds its slice of the averaged gradient; the slices are disjoint, so the
    # square of the global norm is the sum of theirs
    for optimizer in optimizers:
        optimizer.reduce_gradients()
    square_sum = torch.stack([optimizer.gradient_square_sum() for optimizer in optimizers]).sum()
    grad_norm = runtime.all_reduce(square_sum).sqrt()
    scale = (grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if grad_clip > 0 else 1.0
    for optimizer in optimizers:
        optimizer.step(grad_scale=scale)
        optimizer.zero_grad()
    return StepResult(runtime.all_reduce(total), grad_norm)


def set_rates(optimizers: Sequence[BucketOptimizer], lr_scale: float, muon_momentum: float) -> None:
    """Scale every group's initial rate and set Muon's momentum."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale
            if "momentum" in group:
                group["momentum"] = muon_momentum
