"""Every nanosecond of a step once, under the right stage and operation: made-up events of a GPU,
whose answer is known, and real ones of a CPU."""

import gzip
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.registry import Cost, Op, operations
from nanochat.profiler import timeline
from nanochat.profiler.capture import Captured, StepCapture, module_cost, operators, short_name
from nanochat.profiler.timeline import Event, Marks
from nanochat.train.step import train_step

MAIN, AUTOGRAD, LOADER, STREAM, OTHER_STREAM = 1, 2, 3, 7, 13
SEQUENCE = Marks([(0, "rms_norm"), (4, "attn.c_qkv"), (8, "")])


def kernel(name: str, start: int, end: int, launcher: int, stream: int = STREAM) -> Event:
    return Event(name, start, end, stream, on_gpu=True, launcher=launcher)


def a_step_on_a_gpu(at: int = 0) -> list[Event]:
    """Data until 100, forward until 300, backward until 500, optimizer until 1000. The kernels lag
    behind the host: rms_norm's runs in the middle of the backward pass."""
    e = [
        Event("stage: step", 0, 1000, MAIN, annotation=True),
        Event("stage: forward", 100, 300, MAIN, annotation=True),
        Event("module: model", 100, 290, MAIN, annotation=True),
        Event("op: rms_norm", 110, 150, MAIN, annotation=True),
        Event("aten::rms_norm", 115, 145, MAIN, sequence=3, id=1),
        Event("module: attn.c_qkv", 160, 200, MAIN, annotation=True),
        Event("aten::mm", 165, 190, MAIN, sequence=5, id=2),
        Event("stage: backward", 300, 500, MAIN, annotation=True),
        Event(f"{timeline.EVALUATE}MmBackward0", 310, 350, AUTOGRAD, sequence=5),
        Event("aten::mm", 320, 340, AUTOGRAD, id=3),
        Event(f"{timeline.EVALUATE}RmsBackward0", 360, 380, AUTOGRAD, sequence=3),
        Event("aten::rms", 365, 375, AUTOGRAD, id=4),
        Event(f"{timeline.EVALUATE}torch::autograd::AccumulateGrad", 390, 420, AUTOGRAD),
        Event("aten::add_", 395, 415, AUTOGRAD, id=5),
        Event("op: adamw_step", 600, 650, MAIN, annotation=True),
        Event("nanochat::adamw_step", 605, 640, MAIN, id=6),
        Event("c10d::allreduce_", 510, 520, MAIN, id=7),
        Event("aten::copy_", 30, 40, LOADER, id=8),
        kernel("norm", 330, 430, 1),
        kernel("gemm", 430, 500, 2),
        kernel("gemm", 500, 560, 3),
        kernel("norm_backward", 560, 600, 4),
        kernel("add", 610, 620, 5),
        kernel("ncclDevKernel_AllReduce", 590, 690, 7, OTHER_STREAM),
        kernel("adamw", 700, 800, 6),
        kernel("Memcpy HtoD", 790, 830, 8, OTHER_STREAM),
        kernel("foreign", 900, 910, 99),
        Event("stage: forward", 330, 500, STREAM, on_gpu=True, annotation=True),
    ]
    return [replace(x, start=x.start + at, end=x.end + at) for x in e]


def test_kernels_count_for_what_launched_them() -> None:
    division = timeline.divide(a_step_on_a_gpu(), SEQUENCE, {}, on_gpu=True)
    assert dict(division.nanoseconds) == {
        ("data", "other"): 100 + 30,  # the GPU waits for data; the copy beside adamw is free
        ("idle", "forward"): 200,
        ("idle", "backward"): 30,
        ("forward", "rms_norm"): 100,
        ("forward", "attn.c_qkv"): 70,
        ("backward", "attn.c_qkv"): 60,
        ("backward", "rms_norm"): 40,
        ("backward", "gradient accumulation"): 10,
        ("communication", "communication"): 80,  # of 100: beside 600-610 and 620-690 nothing ran
        ("optimizer", "adamw_step"): 100,
        ("optimizer", "no known launcher"): 10,
        ("idle", "optimizer"): 10 + 160,
    }
    assert division.top["gemm"] == (130, 2)
    assert next(iter(division.top)) == "gemm"
    assert sorted(division.gaps) == [10, 30, 70, 90, 200]


def test_steps_add_up_and_what_is_between_them_does_not_count() -> None:
    events = [*a_step_on_a_gpu(), kernel("evaluation", 1100, 1900, 0), *a_step_on_a_gpu(2000)]
    division = timeline.divide(events, SEQUENCE, {}, on_gpu=True)
    assert division.steps == 2
    assert sum(division.nanoseconds.values()) == 2000
    assert division.nanoseconds["forward", "rms_norm"] == 200
    assert division.by_category()["idle"] == 2 * 400
    assert "evaluation" not in division.top
    with pytest.raises(ValueError, match="no whole step"):
        timeline.divide(events[1:5], SEQUENCE, {}, on_gpu=True)


def test_a_compiled_graph_tells_its_operators() -> None:
    events = [
        Event("stage: step", 0, 400, MAIN, annotation=True),
        Event("stage: forward", 0, 200, MAIN, annotation=True),
        Event("Torch-Compiled Region: 0/0", 10, 190, MAIN),
        Event("nanochat::relu2_product", 20, 60, MAIN, id=1),
        Event("aten::mm", 70, 100, MAIN, id=2),
        Event("stage: backward", 200, 400, MAIN, annotation=True),
        Event(f"{timeline.EVALUATE}CompiledFunctionBackward", 210, 390, MAIN, sequence=1),
        Event("aten::_scaled_dot_product_flash_attention_backward", 220, 300, MAIN, id=3),
        Event("aten::mm", 391, 395, MAIN),
    ]
    found = timeline.divide(events, SEQUENCE, {"nanochat::relu2_product": "relu2_mlp"}, False)
    assert dict(found.nanoseconds) == {
        ("idle", "forward"): 20,
        ("idle", "backward"): 16,
        ("forward", "relu2_mlp"): 40,
        ("forward", "compiled, matrix products"): 30,
        ("forward", "compiled, fused"): 110,
        ("backward", "attention"): 80,
        ("backward", "compiled, fused"): 100,
        ("backward", "other"): 4,
    }


def test_waiting_for_other_ranks_is_communication() -> None:
    """On a CPU: a call that starts a collective, work beside it, a wait that no event shows."""
    events = [
        Event("stage: step", 0, 400, MAIN, annotation=True),
        Event("stage: forward", 0, 10, MAIN, annotation=True),
        Event("c10d::allgather_", 100, 120, MAIN),
        Event("gloo:all_gather", 110, 300, LOADER, annotation=True),
        Event("gloo:all_gather", 130, 200, AUTOGRAD, annotation=True),
        Event("aten::mul", 150, 170, MAIN),
    ]
    found = timeline.divide(events, SEQUENCE, {}, on_gpu=False)
    assert dict(found.nanoseconds) == {
        ("idle", "forward"): 10,
        ("idle", "optimizer"): 90 + 100,
        ("communication", "communication"): 20 + 30 + 130,
        ("optimizer", "other"): 20,
    }


def test_every_custom_operator_belongs_to_an_operation() -> None:
    names, ops = operators(), operations()
    assert names["nanochat::rms_norm_backward"] == "rms_norm"
    assert names["nanochat::add_rms_norm"] == "add_rms_norm"
    assert names["nanochat::times"] == "linear_cross_entropy"
    assert names["nanochat::symmetric_product"] == "newton_schulz"
    assert set(names.values()) <= set(ops)
    assert {name for name in torch._library.custom_ops.OPDEFS if "nanochat::" in name} == {*names}


SLOW = 0.03  # seconds; a sleep lasts at least as long as asked for, however busy the machine is


class Sleepy(torch.autograd.Function):
    """x, after SLOW forward and 2 SLOW backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(SLOW)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        time.sleep(2 * SLOW)
        return dy


def runtime() -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, 0, 0, 1, 0, Path())


def captured(steps: int, trace: Path | None = None, distributed: bool = False) -> Captured:
    """Steps of a model of two layers, each with two micro-batches and a slow loader."""
    torch.set_num_threads(1)
    model = GPT(GPTConfig(16, 128, 2, 1, 1, 128), torch.float32)
    model.init_weights(0)
    optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=distributed)
    ids = torch.randint(128, (2, 17))
    capture = StepCapture(model, optimizers, steps, False, trace=trace)
    found = None
    while found is None:
        capture.begin()
        begun = time.perf_counter()
        time.sleep(SLOW / 3)
        batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * 2
        train_step(model, optimizers, batches, runtime())
        found = capture.end(time.perf_counter() - begun)
    return found


def test_backward_time_lands_on_the_operation_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    op = operations()["qk_norm_rope"]
    reference = op.reference

    def slow(qkv: Tensor, *args: object, **kwargs: object) -> object:
        return reference(Sleepy.apply(qkv), *args, **kwargs)

    monkeypatch.setattr(op, "_call", slow)
    found = captured(steps=2)
    milliseconds = {k: v / 1e6 / 2 for k, v in found.division.nanoseconds.items()}
    calls = 2 * 2  # layers, micro-batches
    least = 1e3 * SLOW * calls
    assert milliseconds["forward", "qk_norm_rope"] > least
    assert milliseconds["backward", "qk_norm_rope"] > 2 * least
    assert found.tally.calls["forward", "qk_norm_rope"] == 2 * calls
    # the categories are the whole step as the host's clock has it, the loader's time among them
    total = sum(found.division.nanoseconds.values()) / 1e9
    assert total == pytest.approx(sum(found.seconds), rel=0.02)
    assert found.division.by_category()["data"] / 1e6 / 2 > 1e3 * SLOW / 3
    assert op._call is slow


def test_costs_are_those_of_the_calls() -> None:
    found = captured(steps=1)
    tally, tokens, layers, micro_batches, width = found.tally, 2 * 16, 2, 2, 128
    assert tally.calls["forward", "rms_norm"] == 2 * micro_batches
    assert tally.calls["optimizer", "adamw_step"] == 2
    product = 2 * tokens * width * 3 * width * layers * micro_batches
    assert tally.flops["forward", "attn.c_qkv"] == product
    assert tally.flops["backward", "attn.c_qkv"] == 2 * product
    mlp = 2 * 2 * tokens * width * 4 * width * layers * micro_batches
    assert tally.flops["forward", "relu2_mlp"] == mlp
    assert tally.flops["backward", "relu2_mlp"] == 2 * mlp
    assert set(tally.calls) <= set(found.division.nanoseconds)
    linear = module_cost(torch.nn.Linear(3, 5, bias=False), (torch.zeros(7, 3),))
    assert linear == Cost(210, 4 * (21 + 15 + 35), Cost(420, 4 * (42 + 30 + 35)))
    assert module_cost(torch.nn.ReLU(), (torch.zeros(2),)) is None


def test_the_optimizers_collectives_are_communication(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = captured(steps=1, trace=tmp_path / "trace.json.gz", distributed=True)
    finally:
        dist.destroy_process_group()
    assert found.division.by_category()["communication"] > 0
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        names = Counter(event.get("name", "") for event in json.load(file)["traceEvents"])
    # ours are in the trace, those of the backward pass too
    assert names["op: relu2_mlp"] == 2 * 2
    assert names["stage: step"] == 1
    assert names["relu2_mlp, backward (MmBackward0)"] == 2 * 2 * 2
    assert not any(name.startswith(timeline.EVALUATE) for name in names)


@pytest.mark.parametrize("steps_done", [0, 1], ids=["warming up", "recording"])
def test_nothing_stays_installed(steps_done: int) -> None:
    before = {op: op._call for op in operations().values()}
    model = GPT(GPTConfig(16, 128, 1, 1, 1, 128), torch.float32)
    capture = StepCapture(model, [], 1, False)
    for _ in range(steps_done):
        capture.begin()
        assert capture.end(1.0) is None
    capture.begin()
    assert all(op._call is not call for op, call in before.items())
    capture.close()
    assert {op: op._call for op in operations().values()} == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not torch.autograd._profiler_enabled()


def test_a_compiled_model_is_left_alone() -> None:
    """What the graph has traced is not wrapped, so it is not compiled again; optimizers are."""
    model = GPT(GPTConfig(16, 128, 1, 1, 1, 128), torch.float32)
    optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)
    before = {name: op._call for name, op in operations().items()}
    capture = StepCapture(model, optimizers, 1, False, compiled=True)
    capture.begin()
    wrapped = {name for name, op in operations().items() if op._call is not before[name]}
    capture.close()
    assert wrapped == {"adamw_step", "newton_schulz"}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "short"),
    [("blocks.3.attn.c_qkv", "attn.c_qkv"), ("blocks.3", "block"), ("wte", "wte")],
)
def test_layers_share_a_name(name: str, short: str) -> None:
    assert short_name(name) == short


def test_without_a_profile_an_operation_is_the_call_of_its_implementation() -> None:
    """Without a profile an operation is the function that was selected, and nothing around it."""
    assert isinstance(operations()["rms_norm"], Op)
    code = Op.__call__.__code__
    assert set(code.co_names) == {"_call"}
