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
    """
    nats = torch.zeros((), dtype=torch.float64, device=runtime.device)
    total_bytes = torch.zeros((), dtype=torch.int64, device=runtime.device)
    for inputs, targets in batches:
        loss = model(inputs, targets, loss_reduction="none")
        num_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        nats += torch.where(num_bytes > 0, loss, 0).sum(dtype=torch.float64)
        total_bytes += num_bytes.sum()
    runtime.all_reduce(nats)
    runtime.all_reduce(total_bytes)
    if total_bytes.item() == 0:
        return math.inf
    return nats.item() / (math.log(2) * total_bytes.item())


@torch.no_grad()
def evaluate_loss(
    model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], runtime: Runtime
) -> float:
    """Nats per target of `model` over (inputs, targets) batches, over all ranks.

    Targets of -1 do not count. Returns inf if none counts.
    """
    nats = torch.zeros((), dtype=torch.float64, device=runtime.device)
    count = torch.zeros((), dtype=torch.int64, device=runtime.device)
    for inputs, targets in batches:
        nats += model(inputs, targets, loss_reduction="sum").double()
        count += (targets >= 0).sum()
    runtime.all_reduce(nats)
    runtime.all_reduce(count)
    return nats.item() / count.item() if count.item() else math.inf
