"""One optimizer step: micro-batches, backward, gradient reduction, clipping, update or none.

The loss is normalised by the number of valid targets of the whole step, over all micro-batches and
ranks, so that a batch with few targets does not weigh more than its tokens.

Example: two ranks with two micro-batches each, of 100, 60, 100 and 40 valid targets. `valid` is 300
everywhere, each micro-batch adds (sum of its nats) / 300, and a token counts 1/300 wherever it is.
Means of means would give the tokens of the last micro-batch 1/160, those of the first 1/400.

Weights and optimizers change all at once, at the end, on every rank, or nowhere: a step whose loss
or gradient is not finite on one rank is skipped on all; what stops one rank, a signal or too little
memory, ends the step on all.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.common import RanksOutOfMemoryError, Runtime, StoppedError
from nanochat.kernels.linear_cross_entropy import IGNORE_INDEX
from nanochat.optim.sharding import BucketOptimizer
from nanochat.profiler.capture import stage


class StepResult(NamedTuple):
    """What the ranks agree on; the tensors are zero-dimensional and on the host."""

    loss: Tensor  # nats per valid target, mean over all ranks
    grad_norm: Tensor  # of the whole gradient, before clipping
    finite: bool  # loss and gradient are; otherwise nothing was updated


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
    """Train on micro-batches (inputs, targets, ...) and update the parameters once, or not at all.

    The host waits for loss and norm before the update, which then runs beside the next batch.
    grad_clip  largest global gradient norm; 0 leaves the gradient as it is.
    loss_sum   of the valid targets of one micro-batch.
    Raises     on every rank, with nothing updated: StoppedError if one was asked to stop,
               RanksOutOfMemoryError if one ran out of memory in a micro-batch.
    """
    # how many targets the whole step has: known before the first backward, from the data alone
    valid = torch.zeros((), dtype=torch.int64, device=runtime.device)
    for batch in micro_batches:
        valid += (batch[1] != IGNORE_INDEX).sum()
    valid = runtime.all_reduce(valid.float()).clamp(min=1)
    total = torch.zeros((), device=runtime.device)
    out_of_memory = False
    try:
        for batch in micro_batches:
            if runtime.asked_to_stop:
                break  # the other ranks learn of it with the norm
            with stage("forward"):
                loss = loss_sum(model, batch) / valid
            # the optimizers average over ranks, and `valid` already counts all of them
            with stage("backward"):
                (loss * runtime.world_size).backward()
            total += loss.detach()
    except torch.OutOfMemoryError:
        out_of_memory = True
        for optimizer in optimizers:
            optimizer.zero_grad()
    # every rank then holds its slice of the averaged gradient; the slices are disjoint, so the
    # square of the global norm is the sum of theirs
    for optimizer in optimizers:
        optimizer.reduce_gradients()
    square_sum = torch.stack([optimizer.gradient_square_sum() for optimizer in optimizers]).sum()
    # one reduction and one read decide: what one rank sees, a NaN too, reaches all of them alike
    flags = [torch.full_like(total, flag) for flag in (runtime.asked_to_stop, out_of_memory)]
    reduced = runtime.all_reduce(torch.stack((total, square_sum, *flags)))
    loss, norm_squared, asked_to_stop, num_out_of_memory = reduced.cpu()
    finite = bool((loss + norm_squared).isfinite())
    if finite and not asked_to_stop and not num_out_of_memory:
        grad_norm = reduced[1].sqrt()
        scale = (grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if grad_clip > 0 else 1.0
        for optimizer in optimizers:
            optimizer.step(grad_scale=scale)
    for optimizer in optimizers:
        optimizer.zero_grad()
    if asked_to_stop:
        raise StoppedError
    if num_out_of_memory:
        raise RanksOutOfMemoryError(f"on {num_out_of_memory:.0f} of {runtime.world_size} ranks")
    return StepResult(loss, norm_squared.sqrt(), finite)


def set_rates(optimizers: Sequence[BucketOptimizer], lr_scale: float, muon_momentum: float) -> None:
    """Scale every group's initial rate and set Muon's momentum."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale
            if "momentum" in group:
                group["momentum"] = muon_momentum
