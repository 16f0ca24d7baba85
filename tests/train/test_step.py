"""The optimizer step: normalisation, accumulation, clipping, and that it learns."""

import pytest
import torch

from nanochat.common import Runtime, setup_training
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.run import build_model
from nanochat.train.step import set_rates, train_step

CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


@pytest.fixture
def runtime() -> Runtime:
    return setup_training("cpu")


def fresh(runtime: Runtime) -> tuple[GPT, list]:
    model = build_model(CONFIG, runtime, seed=0)
    return model, model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)


def batch(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(64, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:].clone()


def test_it_learns_a_batch_by_heart(runtime: Runtime) -> None:
    model, optimizers = fresh(runtime)
    pairs = [batch(4)]
    losses = [train_step(model, optimizers, pairs, runtime).loss.item() for _ in range(40)]
    assert losses[0] == pytest.approx(torch.tensor(64.0).log().item(), abs=1e-4)
    assert losses[-1] < 0.2 * losses[0]


def test_accumulated_micro_batches_equal_one_batch(runtime: Runtime) -> None:
    inputs, targets = batch(8)
    targets[:3] = -1  # micro-batches with unequal numbers of targets
    targets[6, 4:] = -1
    whole, accumulated = fresh(runtime), fresh(runtime)
    parts = list(zip(inputs.split(2), targets.split(2), strict=True))
    for _ in range(3):
        a = train_step(*whole, [(inputs, targets)], runtime)
        b = train_step(*accumulated, parts, runtime)
        assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-5)
        assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-4)


def test_a_batch_without_targets_changes_nothing(runtime: Runtime) -> None:
    model, optimizers = fresh(runtime)
    inputs, targets = batch(2)
    before = [p.clone() for p in model.parameters()]
    result = train_step(model, optimizers, [(inputs, torch.full_like(targets, -1))], runtime)
    assert result.loss.item() == 0.0
    assert result.grad_norm.item() == 0.0
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_the_norm_is_that_of_the_whole_gradient_and_clips(runtime: Runtime) -> None:
    model, optimizers = fresh(runtime)
    pairs = [batch(4)]
    model(*pairs[0]).backward()
    want = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    result = train_step(model, optimizers, pairs, runtime, grad_clip=1e-3)
    assert result.grad_norm.item() == pytest.approx(want.item(), rel=1e-5)


def test_rates_follow_the_schedule(runtime: Runtime) -> None:
    _, (adamw, muon) = fresh(runtime)
    initial = [group["lr"] for group in adamw.param_groups]
    set_rates([adamw, muon], 0.5, 0.9)
    assert [group["lr"] for group in adamw.param_groups] == [0.5 * lr for lr in initial]
    assert muon.param_groups[0]["lr"] == 0.01
    assert all(group["momentum"] == 0.9 for group in muon.param_groups)
