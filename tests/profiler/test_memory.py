"""Memory of a step, counted: against torch's own allocation events, and against what operations say
they save."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nanochat.common import Runtime, setup_training
from nanochat.gpt import GPT
from nanochat.kernels.registry import operations
from nanochat.profiler.allocator import allocator_history
from nanochat.profiler.memory import MemoryReport, measure_memory
from nanochat.profiler.ranges import watched
from nanochat.train.rehearsal import count_memory
from nanochat.train.run import build_model, model_config
from nanochat.train.step import train_step

CONFIG = model_config(2, -1, 64, 512)
REFERENCE = dict.fromkeys(operations(), "reference")
TRITON = REFERENCE | {
    "attention": "sdpa", "linear_cross_entropy": "triton", "rms_norm": "triton",
    "add_rms_norm": "triton", "qk_norm_rope": "triton", "relu2_mlp": "triton_pointwise",
    "adamw_step": "triton", "newton_schulz": "triton",
}  # fmt: skip


def real_step(runtime: Runtime) -> tuple[GPT, list, Callable[[], object]]:
    model = build_model(CONFIG, runtime, seed=0)
    optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    return model, optimizers, lambda: train_step(model, optimizers, [(ids, ids)] * 2, runtime)


def measured() -> MemoryReport:
    return measure_memory(*real_step(setup_training("cpu")))


def allocated_peak(step: Callable[[], object]) -> int:
    """Most bytes above those before the step, by the events of PyTorch's own CPU allocator."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    total = peak = 0
    for event in profile.profiler.kineto_results.events():  # pyright: ignore
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_the_peak_is_that_of_the_allocator(attention: str) -> None:
    operations()["attention"].use(attention)
    try:
        model, optimizers, step = real_step(setup_training("cpu"))
        step()  # whatever is made once only
        allocated = allocated_peak(step)
        report = measure_memory(model, optimizers, step)
    finally:
        operations()["attention"].use("reference")
    counted = sum(report.peak.values()) - sum(report.steady.values())
    assert counted == pytest.approx(allocated, rel=0.02)


def test_what_stays_is_the_model_and_the_optimizer() -> None:
    model, optimizers, step = real_step(setup_training("cpu"))
    report = measure_memory(model, optimizers, step)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    # two moments for embedding and head, one for the matrices
    count = model.num_parameters()
    state = 4 * (2 * (count.embedding + count.head) + count.matrices)
    rest = dict.fromkeys(report.steady, 0)
    assert report.steady == rest | {"weights": weights, "optimizer": state}
    assert report.peak["gradients"] == 4 * count.total
    assert max(report.timeline) == sum(report.peak.values())


def test_a_leak_is_seen() -> None:
    model, optimizers, step = real_step(setup_training("cpu"))
    leaked = []

    def leaking() -> None:
        step()
        leaked.append(torch.ones(1000))

    assert measure_memory(model, optimizers, leaking).steady["temporaries"] == 4000


def test_activations_are_what_a_layer_saves() -> None:
    """x, then relu(y): y itself and the weights, which a view of is saved too, are not kept."""
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.zeros(16, 8)).sum().backward()
        optimizer.zero_grad()

    report = measure_memory(model, [optimizer], step)
    assert report.activations == {("0", "0"): 16 * 8 * 4, ("1", "1"): 16 * 32 * 4}


def test_kernels_save_what_they_say() -> None:
    """The "Saves" of each operation's docstring, in units of tokens x width x 2 bytes."""
    B, depth = 2, 2
    config = model_config(depth, -1, 1024, 8192)
    report = count_memory(config, B, TRITON)
    N, C, H, V = B * config.sequence_len, config.n_embd, config.n_head, config.vocab_size
    unit = 2 * N * C
    assert report.by_operation() == {
        "relu2_mlp": depth * 5 * unit,  # its input and post
        "qk_norm_rope": depth * 3 * unit,
        "attention": depth * (3 * unit + 4 * N * H + 24),  # q, k, y, row sums and the seed
        "add_rms_norm": depth * 2 * unit,
        "rms_norm": 2 * unit,
        "c_qkv": depth * unit,
        "linear_cross_entropy": unit + 4 * V * C,  # dx and dW
        "outside the model": 4,  # the number of targets
    }
    layers = {module.split(".")[1] for module, _ in report.activations if "blocks" in module}
    assert layers == {"0", "1"}
    assert report.peak["weight copies"] == 2 * (12 * depth * C * C + V * C)


def test_the_meta_device_counts_what_the_cpu_does() -> None:
    """In float32 both run the same; the norm alone is counted as on a GPU, with its row sums."""
    cpu, meta = measured(), count_memory(CONFIG, 2, REFERENCE, torch.float32)
    assert meta.steady == cpu.steady
    ours, theirs = meta.by_operation(), cpu.by_operation()
    for name in ("relu2_mlp", "attention", "linear_cross_entropy", "c_qkv", "c_proj"):
        assert ours[name] == theirs[name]
    assert sum(meta.peak.values()) == pytest.approx(sum(cpu.peak.values()), rel=0.01)


def test_the_moment_of_the_peak() -> None:
    """Many tokens: the loss. One token: the optimizer, whose stacks outweigh everything."""
    assert "linear_cross_entropy" in count_memory(CONFIG, 8, TRITON).peak_moment
    tiny = model_config(2, -1, 1, 512)
    assert count_memory(tiny, 1, TRITON).peak_moment.startswith("optimizer, Muon")


def test_a_chunk_of_logits_is_workspace() -> None:
    report = count_memory(model_config(2, -1, 4096, 8192), 2, TRITON)
    assert report.peak["workspace"] > 4096 * 8192 * 2


def test_nothing_is_left_behind() -> None:
    model, optimizers, step = real_step(setup_training("cpu"))
    calls = {name: op._call for name, op in operations().items()}
    entered: list[str] = []

    def failing() -> None:
        with watched(model, optimizers, lambda kind, name: entered.append(name), entered.pop):
            model(torch.zeros(1, 999, dtype=torch.int64))  # longer than the context

    with pytest.raises(ValueError, match="999 tokens"):
        failing()
    assert entered == []
    step()
    assert entered == []
    assert {name: op._call for name, op in operations().items()} == calls


def test_the_allocators_history_is_written_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    memory = torch.cuda.memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "_record_memory_history", lambda **given: done.append(given))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: done.append(path))
    path = tmp_path / "new" / "memory.pickle"
    with pytest.raises(torch.OutOfMemoryError), allocator_history(path):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert done[0]["stacks"] == "python"
    assert done[1:] == [str(path), {"enabled": None}]
    assert str(path) in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_no_allocator_no_history(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA device"), allocator_history(tmp_path / "x"):
        pass
