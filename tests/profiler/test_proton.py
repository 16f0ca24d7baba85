"""What Triton would tell Proton of a launch, without a GPU: Triton compiles, and asks us."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.kernels.launch import describers, launch
from nanochat.kernels.registry import Op, operations
from nanochat.profiler import proton

CPU = torch.device("cpu")


class FakeKernel:
    """Takes launches as a compiled Triton kernel does, and tells its hook at once."""

    def __init__(self) -> None:
        self.launch_metadata = None
        self.told: list[dict] = []

    def __getitem__(self, grid):
        metadata = type("Metadata", (), {"name": "fake_kernel"})
        return lambda x: self.told.append(self.launch_metadata(grid, metadata, {"x_ptr": x}))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """rms_norm that launches two kernels forward, one beside the graph, and one backward."""
    kernel, op = FakeKernel(), operations()["rms_norm"]

    class Fake(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            launch(kernel, (1,), x)
            launch(kernel, (1,), x)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
            launch(kernel, (1,), dy)
            return dy

    monkeypatch.setattr(op, "_call", Fake.apply)
    return kernel


def test_flops_and_bytes_are_those_of_the_cost(fake: FakeKernel) -> None:
    op: Op = operations()["rms_norm"]
    big = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    small = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    with proton.launch_costs():
        (op(big) * 2).sum().backward()
        (op(op(small)) ** 2).sum().backward()
    assert not describers
    per_pass = [(m["name"], m.get("flops16", 0.0), m.get("bytes", 0.0)) for m in fake.told]
    forward, backward = "rms_norm, forward: fake_kernel", "rms_norm, backward: fake_kernel"
    first, second = op.cost(big), op.cost(small)
    assert first.backward
    assert second.backward
    assert per_pass == [
        (forward, first.flops, first.bytes),
        (forward, 0.0, 0.0),
        (backward, first.backward.flops, first.backward.bytes),
        *[(forward, second.flops, second.bytes), (forward, 0.0, 0.0)] * 2,
        *[(backward, second.backward.flops, second.backward.bytes)] * 2,
    ]
    op(small)
    assert fake.told[-1] == {}, "nobody profiles any more"


ASKED_BY_TRITON = """
import json
from dataclasses import asdict
import torch
from nanochat.kernels import aot
from nanochat.kernels.launch import launch_metadata, recording
from nanochat.kernels.optional_triton import triton
from nanochat.kernels.registry import operations
from nanochat.profiler import proton

op = operations()["adamw_step"]
example = next(iter(op.examples(torch.device("cpu"), torch.float32)))
with recording("sm_90") as recorder:
    op.implementations["triton"].call(*example)
(recorded,) = recorder.launches
compiled = aot.compile_for(recorded, 90)
compiled._init_handles, compiled.function = lambda: None, 0
triton.knobs.runtime.launch_enter_hook = lambda metadata: None
compiled.src.fn.launch_metadata = launch_metadata
# as Proton's hook does, before the launch
op._call = lambda *_: compiled.launch_metadata((1,), 0, *recorded.arguments).get()
with proton.launch_costs():
    told = op(*example)
print(json.dumps([told, asdict(op.cost(*example))]))
"""


def test_triton_itself_asks_for_them() -> None:
    """Its own CompiledKernel.launch_metadata, on a kernel compiled for a GPU that is not here.

    In a process of its own, since the interpreter of these tests changes Triton's language.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ASKED_BY_TRITON], env=environment, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, cost = json.loads(done.stdout)
    assert told["name"] == "adamw_step, forward: step_kernel"
    assert told["flops32"] == cost["flops"]
    assert told["bytes"] == cost["bytes"]


def test_without_a_gpu_proton_is_refused(tmp_path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--proton needs a CUDA device"):
            proton.proton_profile(tmp_path / "proton").__enter__()
