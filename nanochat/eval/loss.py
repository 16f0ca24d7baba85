"""Losses over batches: bits per byte, which does not depend on the vocabulary, and plain nats.

bpb = sum of nats over the targets / (ln 2 * bytes of the targets)
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nanochat.common import Runtime


@torch.no_grad()
def evaluate_bpb(
    model: torch.nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    runtime: Runtime,
) -> float:
    """Bits per byte of `model` over (inputs, targets) batches, over all ranks.

    token_bytes  (vocab_size,) UTF-8 bytes of each token, 0 for special tokens, which do not count;
                 neither do targets of -1.
    Returns      inf if no target has bytes.
    Raises       as Runtime.sum_over_ranks does.
    """

    def of_this_rank() -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        for inputs, targets in batches:
            runtime.check_stop()
            loss = model(inputs, targets, loss_reduction="none")
            num_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
            sums[0] += torch.where(num_bytes > 0, loss, 0).sum(dtype=torch.float64)
            sums[1] += num_bytes.sum()
        return sums

    nats, total_bytes = runtime.sum_over_ranks(2, of_this_rank)
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf


@torch.no_grad()
def evaluate_loss(
    model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], runtime: Runtime
) -> float:
    """Nats per target of `model` over (inputs, targets) batches, over all ranks.

    Targets of -1 do not count. Returns inf if none counts. Raises as Runtime.sum_over_ranks does.
    """

    def of_this_rank() -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        for inputs, targets in batches:
            runtime.check_stop()
            sums[0] += model(inputs, targets, loss_reduction="sum").double()
            sums[1] += (targets >= 0).sum()
        return sums

    nats, count = runtime.sum_over_ranks(2, of_this_rank)
    return nats / count if count else math.inf
