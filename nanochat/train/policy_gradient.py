"""Reinforcement learning from sampled answers: advantages, token losses.

    REINFORCE   A = r - mean(r) over the samples of a question;  loss = -sum A log p / tokens
    GRPO        the same with A / (std(r) + eps)              (arXiv:2402.03300)
    PPO clip    -min(rho A, clip(rho, 1 - e, 1 + e) A), rho = p / p_old    (arXiv:1707.06347)
    KL          + beta (q - log q - 1), q = p_reference / p: unbiased and never negative
Every token of the sampled answers counts alike (token-level normalisation, arXiv:2503.14476);
tokens the tool or the prompt put there do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.kernels.linear_cross_entropy import IGNORE_INDEX

STD_EPS = 1e-6


class PolicyBatch(NamedTuple):
    """inputs, targets (B, T) int64, -1 where a token does not count; advantages (B,);
    old and reference log-probabilities (B, T) of the targets, or None."""

    inputs: Tensor
    targets: Tensor
    advantages: Tensor
    old_logp: Tensor | None = None
    reference_logp: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a PolicyBatch: `clip` 0 and `kl` 0 is REINFORCE.

    clip  how far p / p_old may go from 1 before its gradient stops.
    kl    weight of the divergence from the reference model.
    """

    clip: float = 0.0
    kl: float = 0.0

    def __post_init__(self) -> None:
        if self.clip < 0 or self.kl < 0:
            raise ValueError(f"clip {self.clip} and kl {self.kl} must not be negative")

    def __call__(self, model: torch.nn.Module, batch: PolicyBatch) -> Tensor:
        """Sum over the counting tokens; fit for `train_step`, which divides by their number."""
        counts = batch.targets != IGNORE_INDEX
        logp = log_probabilities(model, batch.inputs, batch.targets)
        advantage = batch.advantages[:, None]
        if self.clip:
            assert batch.old_logp is not None
            ratio = (logp - batch.old_logp).exp()
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            loss = -torch.minimum(ratio * advantage, clipped * advantage)
        else:
            loss = -logp * advantage
        if self.kl:
            assert batch.reference_logp is not None
            log_q = batch.reference_logp - logp
            loss = loss + self.kl * (log_q.exp() - log_q - 1)
        return torch.where(counts, loss, 0).sum()


def log_probabilities(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """log p (B, T) of the targets; 0 where there is none."""
    return -model(inputs, targets, loss_reduction="none")


def advantages(rewards: Tensor, normalize_std: bool = False) -> Tensor:
    """Rewards (N,) of one question's samples, less their mean, perhaps over their deviation."""
    centred = rewards - rewards.mean()
    return centred / (rewards.std(correction=0) + STD_EPS) if normalize_std else centred


def pad_samples(
    sequences: Sequence[list[int]], masks: Sequence[list[int]], filler: int
) -> tuple[Tensor, Tensor]:
    """inputs and targets (N, T) of token sequences; mask 1: the model sampled the token."""
    longest = max(len(ids) for ids in sequences)
    ids = torch.tensor([x + [filler] * (longest - len(x)) for x in sequences])
    sampled = torch.tensor([x + [0] * (longest - len(x)) for x in masks], dtype=torch.bool)
    return ids[:, :-1], ids[:, 1:].masked_fill(~sampled[:, 1:], IGNORE_INDEX)
