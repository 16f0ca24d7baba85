"""Advantages, policy losses and pass@k against hand computation and finite enumeration."""

import itertools
import math
from typing import Any

import pytest
import torch

from nanochat.eval.tasks import pass_at_k
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.policy_gradient import (
    PolicyBatch,
    PolicyLoss,
    advantages,
    log_probabilities,
    pad_samples,
)


@pytest.fixture
def model() -> GPT:
    model = GPT(GPTConfig(16, 40, 1, 1, 1, 16))
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.fixture
def batch() -> PolicyBatch:
    inputs, targets = pad_samples(
        [[1, 2, 3, 4, 5], [1, 2, 9, 8], [1, 2, 7, 7, 7]],
        [[0, 0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1, 1]],
        filler=0,
    )
    return PolicyBatch(inputs, targets, advantages(torch.tensor([1.0, 0.0, 0.5])))


def gradients(model: GPT, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_padding_and_masks() -> None:
    inputs, targets = pad_samples([[1, 2, 3], [4, 5]], [[0, 1, 0], [0, 1]], filler=9)
    assert inputs.tolist() == [[1, 2], [4, 5]]
    assert targets.tolist() == [[2, -1], [5, -1]]


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert advantages(rewards).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert advantages(rewards, normalize_std=True).tolist() == pytest.approx(
        [1, -1, -1, 1], rel=1e-4
    )
    assert advantages(torch.ones(4), normalize_std=True).tolist() == [0, 0, 0, 0]


def test_reinforce_weighs_each_sampled_token(model: GPT, batch: PolicyBatch) -> None:
    logits = model(batch.inputs).detach().log_softmax(dim=-1)
    want = 0.0
    for row, column in itertools.product(range(3), range(4)):
        target = int(batch.targets[row, column])
        if target >= 0:
            want -= float(batch.advantages[row] * logits[row, column, target])
    assert PolicyLoss()(model, batch).item() == pytest.approx(want, rel=1e-5)
    logp = log_probabilities(model, batch.inputs, batch.targets)
    assert (logp[batch.targets == -1] == 0).all()


def test_clipping_on_policy_is_reinforce(model: GPT, batch: PolicyBatch) -> None:
    with torch.no_grad():
        old = log_probabilities(model, batch.inputs, batch.targets)
    want = gradients(model, PolicyLoss()(model, batch))
    got = gradients(model, PolicyLoss(clip=0.2)(model, batch._replace(old_logp=old)))
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(w, g, rtol=1e-4, atol=1e-6)


def test_clipping_stops_what_went_far_enough(model: GPT, batch: PolicyBatch) -> None:
    with torch.no_grad():
        now = log_probabilities(model, batch.inputs, batch.targets)
    for far, sign in ((-1.0, 1.0), (1.0, -1.0)):  # p is e times p_old, or the reverse
        moved = batch._replace(old_logp=now + far, advantages=sign * torch.ones(3))
        stopped = gradients(model, PolicyLoss(clip=0.2)(model, moved))
        assert all((g == 0).all() for g in stopped)
        back = batch._replace(old_logp=now + far, advantages=-sign * torch.ones(3))
        assert any((g != 0).any() for g in gradients(model, PolicyLoss(clip=0.2)(model, back)))


def test_divergence_is_zero_at_the_reference(model: GPT, batch: PolicyBatch) -> None:
    with torch.no_grad():
        logp = log_probabilities(model, batch.inputs, batch.targets)
    plain, with_kl = PolicyLoss(), PolicyLoss(kl=0.3)
    same = batch._replace(reference_logp=logp)
    assert with_kl(model, same).item() == pytest.approx(plain(model, batch).item(), rel=1e-5)
    other = batch._replace(reference_logp=logp - 0.5)
    count = (batch.targets >= 0).sum().item()
    extra = with_kl(model, other).item() - plain(model, batch).item()
    assert extra == pytest.approx(0.3 * count * (math.exp(-0.5) + 0.5 - 1), rel=1e-3)


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (6, 2), (8, 7), (5, 5)])
def test_pass_at_k_is_the_share_of_subsets(n: int, right: int) -> None:
    samples = [i < right for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("arguments", [(4, 2, 5), (4, 2, 0), (4, 5, 1)])
def test_impossible_k_is_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match="k must be 1 to 4"):
        pass_at_k(*arguments)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        PolicyLoss(clip=-0.1)
