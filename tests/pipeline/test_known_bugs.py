"""Faults of earlier nanochats that no other test's subject is; each fails on the faulty behaviour.

The tests of a module hold the rest: clipping by a rank's own gradients, optimizer shards of rank 0
alone, eps before the bias correction, bytes of tokens counted through text, resuming after the
first pass, odd depths, steps found by file name, examples beyond the population, no valid target.
"""

import ast
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat import hardware
from nanochat.common import Runtime
from nanochat.data.dataloader import Batch, CUDAPrefetcher
from nanochat.gpt import GPT
from nanochat.kernels import registry
from nanochat.kernels.linear_cross_entropy import softcapped_logits
from nanochat.profiler.throughput import Meter
from nanochat.train import run
from tests.support.runs import ROOT, TINY, make_base_dir, records, run_here

pytestmark = pytest.mark.long

PACKAGES = ("nanochat", "scripts", "tasks", "bench", "experiments", "dev")


def runtime(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Runtime:
    return Runtime(torch.device(device), dtype, 0, 0, 2, 0, Path())


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [("NVIDIA GeForce RTX 5090", 209.5e12), ("NVIDIA H200", 989.5e12), ("NVIDIA H1000", None)],
)
def test_mfu_is_of_the_gpu_at_hand(
    monkeypatch: pytest.MonkeyPatch, gpu: str, peak: float | None
) -> None:
    """Not of an H100, whatever runs; and of no card that is not known."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    monkeypatch.setattr(hardware, "measure_gemm", lambda device, dtype: 1e14)
    peaks = run.device_peaks(runtime("cuda", torch.bfloat16))
    meter = Meter(1000, 10**9, 2 * 10**9, peaks, world_size=2, num_iterations=5)
    values = meter.update(0, loss=1.0, seconds=0.5)
    achieved = 10**9 * 2000 / 2  # FLOP/s of one of two devices
    if peak is None:
        assert values["mfu_causal"] is values["mfu_nanochat"] is None
    else:
        assert values["mfu_causal"] == pytest.approx(achieved / peak)
        assert values["mfu_nanochat"] == pytest.approx(2 * achieved / peak)
    assert values["gemm_share_causal"] == pytest.approx(achieved / 1e14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softcap_is_in_float32(dtype: torch.dtype) -> None:
    """tanh in bfloat16 leaves 256 steps between 0 and the cap's half."""
    x, weight = torch.randn(64, 32).to(dtype), torch.randn(50, 32).to(dtype)
    logits = softcapped_logits(x, weight, 15.0, 50)
    assert logits.dtype == torch.float32
    products = torch.nn.functional.linear(x, weight).double()
    torch.testing.assert_close(logits.double(), 15 * torch.tanh(products / 15), rtol=1e-6, atol=0.0)


def test_every_weight_and_table_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """to_empty leaves what memory held: here NaN."""
    to_empty = GPT.to_empty

    def poisoned(model: GPT, **options: Any) -> GPT:
        to_empty(model, **options)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().fill_(torch.nan)
        return model

    monkeypatch.setattr(GPT, "to_empty", poisoned)
    model = run.build_model(run.model_config(3, -1, 16, 70), runtime(), seed=1)
    bad = [n for n, t in model.state_dict(keep_vars=True).items() if not t.isfinite().all()]
    assert bad == []
    assert [name for name, table in model.named_buffers() if not table.isfinite().all()] == []


@pytest.mark.parametrize("depth", [1, 5, 9, 31])
def test_odd_depths_build_and_run(depth: int) -> None:
    config = run.model_config(depth, -1, 8, 70)
    assert config.head_dim == 128
    with torch.device("meta"):
        model = GPT(config).to("meta")
        assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 70)


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in found]


def loads_code(source: str) -> list[str]:
    """Calls in a source that run what a file says."""
    unsafe = []
    for name, call in calls(ast.parse(source)):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            unsafe.append(ast.unparse(call))
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load"):
            unsafe.append(ast.unparse(call))
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            unsafe.append(ast.unparse(call))
    return unsafe


def test_no_file_is_loaded_that_could_hold_code() -> None:
    assert loads_code("x = torch.load(path)\npickle.loads(b)") != []
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(sources) > 50
    assert {str(p): unsafe for p in sources if (unsafe := loads_code(p.read_text()))} == {}


def test_what_imports_but_cannot_launch_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention package that says it is there, on a GPU its binaries were not built for."""

    def dies(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(registry, "REGISTRY", {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    op = registry.Op(
        "toy",
        lambda x: x,
        cost=lambda x: registry.Cost(0.0, 0.0),
        examples=lambda device, dtype: iter([(torch.ones(2),)]),
        workload=lambda work, device, dtype: (torch.ones(2),),
    )
    op.add("fa3", dies)
    cuda = torch.device("cuda")
    (choice,) = registry.select("auto", cuda, torch.bfloat16)
    assert choice.implementation == "reference"
    assert "no kernel image" in choice.refused["fa3"]
    with pytest.raises(ValueError, match=r"toy=fa3 cannot run.*no kernel image.*toy=reference"):
        registry.select("fa3", cuda, torch.bfloat16)


def test_prefetched_memory_is_not_reused_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a side stream allocated must be known to the stream that reads it."""
    consumer = SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: consumer)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: SimpleNamespace())
    event = SimpleNamespace(record=lambda stream=None: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda *args, **options: event)
    known: list[tuple[Any, Any]] = []

    def tensor() -> Any:
        one = SimpleNamespace(record_stream=lambda stream: known.append((one, stream)))
        one.to = lambda device, non_blocking=False: one
        return one

    class Loader:
        def __next__(self) -> Batch:
            return Batch(tensor(), tensor(), {})

        def close(self) -> None: ...

    prefetcher = CUDAPrefetcher(Loader(), torch.device("cuda"))
    for _ in range(3):
        batch = next(prefetcher)
        assert (batch.inputs, consumer) in known
        assert (batch.targets, consumer) in known
    prefetcher.close()


def test_a_run_saves_and_validates_where_it_is_told(tmp_path: Path) -> None:
    """Not every 4,000 steps, and before the first step too."""
    make_base_dir(tmp_path)
    run_here(
        tmp_path, "python -m scripts.base_train", *TINY, f"--data_dir={tmp_path / 'text'}",
        "--num_iterations=5", "--save_every=2", "--eval_every=2", "--keep_last=-1",
    )  # fmt: skip
    run = tmp_path / "base_checkpoints/d2"
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["000002", "000004", "000005"]
    assert [record["step"] for record in records(run, "eval")] == [0, 2, 4, 5]
    assert all(record["mfu_causal"] is None for record in records(run, "train"))
