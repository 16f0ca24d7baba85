"""The optimizer step: normalisation, accumulation, clipping, that it learns, and when it is left
out."""

import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanochat.common import Runtime, StoppedError, StopRequest, setup_training
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.run import build_model
from nanochat.train.step import cross_entropy_sum, set_rates, train_step
from tests.support.runs import process_restored

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


def snapshot(model: GPT, optimizers: list) -> list[Any]:
    """Copies of every weight and of all that the optimizers hold, step counts too."""
    states = [bucket.state for optimizer in optimizers for bucket in optimizer.buckets]
    values = [value for state in states for value in state.values()]
    values += list(model.parameters())
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in values]


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two snapshots are equal bit for bit."""
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def failing_at(call: int, fail: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, list[int]]:
    """A loss that goes through `fail` at one micro-batch, and the calls it had."""
    calls: list[int] = []

    def loss_sum(model: torch.nn.Module, micro_batch: Any) -> torch.Tensor:
        calls.append(len(calls))
        loss = cross_entropy_sum(model, micro_batch)
        return fail(loss) if calls[-1] == call else loss

    return loss_sum, calls


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    runtime: Runtime, bad: float, where: str
) -> None:
    model, optimizers = fresh(runtime)
    untroubled = fresh(runtime)
    parts = [batch(2, seed) for seed in range(3)]
    train_step(model, optimizers, parts, runtime)
    train_step(*untroubled, parts, runtime)
    before = snapshot(model, optimizers)

    def spoil(loss: torch.Tensor) -> torch.Tensor:
        if where == "loss":
            return loss * bad
        loss.register_hook(lambda gradient: gradient * bad)
        return loss

    loss_sum, calls = failing_at(1, spoil)
    result = train_step(model, optimizers, parts, runtime, loss_sum=loss_sum)
    assert bool(result.loss.isfinite()) == (where == "gradient")
    assert not result.finite
    assert len(calls) == 3
    assert same(snapshot(model, optimizers), before)
    # and leaves nothing changed: the next step is the one there would have been
    for _ in range(2):
        assert train_step(model, optimizers, parts, runtime).finite
        train_step(*untroubled, parts, runtime)
    assert same(snapshot(model, optimizers), snapshot(*untroubled))


def test_a_signal_is_heeded_between_micro_batches(runtime: Runtime) -> None:
    model, optimizers = fresh(runtime)
    before = snapshot(model, optimizers)
    with process_restored():
        listening = replace(runtime, stop=StopRequest())

        def interrupt(loss: torch.Tensor) -> torch.Tensor:
            signal.raise_signal(signal.SIGTERM)
            return loss

        loss_sum, calls = failing_at(1, interrupt)
        with pytest.raises(StoppedError):
            train_step(model, optimizers, [batch(1)] * 256, listening, loss_sum=loss_sum)
        with pytest.raises(StoppedError):  # nor does a step begin any more
            train_step(model, optimizers, [batch(1)], listening, loss_sum=loss_sum)
    assert len(calls) == 2
    assert same(snapshot(model, optimizers), before)


def test_too_little_memory_changes_nothing(runtime: Runtime) -> None:
    model, optimizers = fresh(runtime)
    before = snapshot(model, optimizers)

    def no_memory(loss: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    loss_sum, _ = failing_at(1, no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="on 1 of 1 ranks"):
        train_step(model, optimizers, [batch(2)] * 3, runtime, loss_sum=loss_sum)
    assert same(snapshot(model, optimizers), before)
    assert all(p.grad is None for p in model.parameters())
