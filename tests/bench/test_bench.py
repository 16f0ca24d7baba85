"""The bench's own logic, on made-up rows and clocks: what it refuses, counts, writes and picks."""

import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bench import compare, forecasts, kernels, measure, peers, report, train_steps, tune
from bench.configurations import Use, candidates, with_measured, write_entry
from bench.contenders import (
    Case,
    check_case,
    contenders,
    make_case,
    refusal,
    refusal_at_full_size,
    relative_errors,
)
from bench.report import markdown
from bench.rows import auto_losses, load, save
from bench.session import Ceilings, Replay, Session, replay
from bench.train_steps import SMALL_SIZE, Size, Variant
from bench.tune import Task, Tuner, tasks
from nanochat.common import Runtime
from nanochat.kernels import launch
from nanochat.kernels.registry import REGISTRY, Cost, operations
from nanochat.kernels.rms_norm import FORWARD, rms_norm
from nanochat.kernels.workloads import WORKLOADS, Workload

CPU = torch.device("cpu")
SIZE = Workload("tiny", 1, 128, tokens=16, vocab_size=64)


class FakeTimer:
    """Runs the stages; every one takes what `seconds` says, and is noted."""

    def __init__(self, seconds: Any = lambda: 1.0) -> None:
        self.seconds = seconds
        self.queued: list[float] = []

    def __call__(self, stages: Any, queue_seconds: float) -> tuple[list[float], float]:
        self.queued.append(queue_seconds)
        value, found = None, []
        for stage in stages:
            value = stage(value)
            found.append(self.seconds())
        return found, 0.002


@pytest.fixture
def session(tmp_path: Path) -> Session:
    runtime = Runtime(CPU, torch.float32, 0, 0, 1, 0, tmp_path)
    made = Session(runtime, 0.0, tmp_path / "rows")
    made.__dict__["ceilings"] = Ceilings(1e12, 1e11, 2e12, 2e11)
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warm-up, no garbage collection, and a compiler that changes nothing."""
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


@pytest.fixture(autouse=True)
def references():
    yield
    for op in REGISTRY.values():
        op.use("reference")


def row(**fields: Any) -> dict[str, Any]:
    made = {
        "kind": "kernel", "op": "rms_norm", "workload": "d12", "dtype": "bfloat16", "pass": "both",
        "contender": "triton", "gpu": "NVIDIA H200", "cpu": "a", "role": "ours", "whole": True,
        "auto": False, "status": "timed", "reason": "", "seconds": 1e-3, "lower_quartile": 9e-4,
        "upper_quartile": 2e-3, "over_eager": 2.0, "over_compile": 1.5, "over_peer": None,
        "tflops": 1.0, "gb_per_s": 3.0, "sol_measured": 0.5, "sol_datasheet": 0.25,
        "peak_bytes": 2**20, "shapes": "65536x768", "config": {}, "gemm_flops": 7.9e14,
        "copy_bytes_per_s": 4.3e12,
    }  # fmt: skip
    return made | fields


class TestMeasure:
    def test_order_rotates_and_every_stage_is_sampled(self, quick: None) -> None:
        calls: list[str] = []

        def stages(name: str) -> list[Any]:
            return [lambda _: calls.append(name) or name, lambda value: calls.append(value + "'")]

        clock = itertools.count(1)
        samples = measure.interleave(
            {"a": stages("a"), "b": stages("b")}, FakeTimer(lambda: next(clock)), 0.0
        )
        warm = 2 * 4  # two turns of two contenders of two stages
        assert calls[:warm] == ["a", "a'", "b", "b'"] * 2
        assert calls[warm : warm + 8] == ["a", "a'", "b", "b'", "b", "b'", "a", "a'"]
        assert [len(x) for x in samples["a"]] == [measure.MIN_ROUNDS] * 2
        assert samples["a"][0][:2] == [9, 15]
        assert samples["a"][1][:2] == [10, 16]

    def test_short_launches_get_a_queue(self, quick: None) -> None:
        timer = FakeTimer()
        measure.interleave({"a": [lambda _: None]}, timer, 0.0)
        assert timer.queued[:2] == [0.0, 0.0]  # the host's own time is measured without one
        assert set(timer.queued[2:]) == {measure.QUEUE_FACTOR * 0.002}

    def test_quartiles(self) -> None:
        seconds = [5.0, 1.0, 2.0, 4.0, 3.0]
        assert measure.summarise(seconds) == {
            "seconds": 3.0, "lower_quartile": 2.0, "upper_quartile": 4.0, "rounds": 5,
            "samples": seconds,
        }  # fmt: skip

    def test_cuda_events_stand_around_each_stage_alone(self, monkeypatch: Any) -> None:
        log: list[str] = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("event")

            def elapsed_time(self, stop: Any) -> float:
                return 5.0  # milliseconds

        class Flush:
            def sum(self) -> None:
                log.append("flush")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"wait {cycles}"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
        timer = measure.CUDATimer.__new__(measure.CUDATimer)
        timer.device, timer.other_data = CPU, Flush()  # pyright: ignore[reportAttributeAccessIssue]
        stages = [lambda _: log.append("one"), lambda _: log.append("two")]
        seconds, _ = timer(stages, 1e-3)
        assert seconds == [0.005, 0.005]
        assert log == [
            "wait 2000000",
            *("flush", "event", "one", "event"),
            *("flush", "event", "two", "event"),
            "synchronize",
        ]

    def test_pytest_benchmark_reads_the_samples(self) -> None:
        clock = Replay()
        clock.samples = [0.5, 0.25]
        readings = [clock() for _ in range(4)]
        assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.5, 0.25]


class TestCases:
    @pytest.mark.parametrize("op", operations().values(), ids=list(operations()))
    def test_references_pass_and_leaves_have_gradients(self, op: Any) -> None:
        case = make_case(op, SIZE, CPU, torch.float32)
        eager, exact = case.results(op.reference), case.exact().results(op.reference)
        assert all(x.dtype in (torch.float64, torch.int64) for x in exact)
        assert refusal(eager, eager, exact) == ""
        floats = [x for x in case.arguments if isinstance(x, Tensor) and x.is_floating_point()]
        tables = sum(x.shape[-1] == 64 and x.dim() == 2 for x in floats if "rope" in op.name)
        without = op.name in ("newton_schulz", "adamw_step")
        expected = 0 if without else len(floats) - tables
        assert len(case.leaves) == expected

    def test_an_operation_in_place_is_judged_by_its_arguments(self) -> None:
        weight = torch.ones(3)
        case = Case((weight, 2.0), in_place=True)

        def scale(x: Tensor, factor: float) -> None:
            x.mul_(factor)

        eager, exact = case.results(scale), case.exact().results(scale)
        assert torch.equal(weight, torch.ones(3))
        assert eager[0].tolist() == [2.0] * 3
        assert exact[0].dtype == torch.float64
        assert "result 0" in refusal(case.results(lambda x, factor: None), eager, exact)

    def test_faults_are_refused(self) -> None:
        case = check_case(rms_norm, SIZE, CPU, torch.float32)
        eager, exact = case.results(rms_norm.reference), case.exact().results(rms_norm.reference)

        def refused(*got: Tensor) -> str:
            return refusal(got, eager, exact)

        y, dx = eager
        assert "result 0 errs by" in refused(y * 1.001, dx)
        assert "result 1 errs by" in refused(y, 2 * dx)
        assert "not finite" in refused(torch.full_like(y, torch.nan), dx)
        assert "shape" in refused(y[:-1], dx)
        assert "1 results instead of 2" in refused(y)
        errors = relative_errors(eager, exact)
        assert refusal_at_full_size(eager, eager, errors) == ""
        assert "eager at full size" in refusal_at_full_size([y * 1.001, dx], eager, errors)

    def test_twice_the_error_of_eager_is_the_limit(self) -> None:
        case = check_case(rms_norm, SIZE, CPU, torch.bfloat16)
        eager, exact = case.results(rms_norm.reference), case.exact().results(rms_norm.reference)

        def erring(factor: float) -> list[Tensor]:
            return [w + factor * (e - w) for e, w in zip(eager, exact, strict=True)]

        assert refusal(erring(1.9), eager, exact) == ""
        assert "result 0 errs by" in refusal(erring(2.1), eager, exact)
        errors = relative_errors(eager, exact)
        assert refusal_at_full_size(erring(-2.9), eager, errors) == ""
        assert "eager at full size" in refusal_at_full_size(erring(-3.1), eager, errors)

    def test_exact_steps_of_newton_schulz_are_in_float64(self) -> None:
        case = make_case(REGISTRY["newton_schulz"], SIZE, CPU, torch.bfloat16)
        assert case.arguments[2] == torch.bfloat16
        assert case.exact().arguments[2] == torch.float64

    def test_a_lucky_mean_does_not_refuse_the_next(self) -> None:
        exact = [torch.tensor(11.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
        eager = [torch.tensor(11.0), torch.ones(4, dtype=torch.bfloat16)]
        assert refusal([torch.tensor(11.0002), eager[1]], eager, exact) == ""
        assert "result 0" in refusal([torch.tensor(11.1), eager[1]], eager, exact)
        assert "result 1" in refusal([eager[0], torch.full((4,), 1.00003)], eager, exact)


class TestKernelRows:
    def test_wrong_and_absent_are_named_and_not_timed(
        self, session: Session, quick: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def absent() -> Any:
            raise ImportError("No module named 'absent'")

        def failing(x: Tensor) -> Tensor:
            raise RuntimeError("no kernel image\nmore")

        loaders = {
            "right": lambda: lambda x: rms_norm.reference(x),
            "wrong": lambda: lambda x: 1.01 * rms_norm.reference(x),
            "failing": lambda: failing,
            "absent": absent,
        }
        monkeypatch.setitem(peers.PEERS, "rms_norm", loaders)
        monkeypatch.setattr("bench.contenders._peer", unguarded_peer)
        session.__dict__["timer"] = FakeTimer()
        rows = {
            r["contender"]: r for r in kernels.kernel_rows(rms_norm, SIZE, session) if r["whole"]
        }
        status = {name: r["status"] for name, r in rows.items()}
        assert status == {
            "eager": "timed", "compile": "timed", "triton": "missing", "right": "timed",
            "wrong": "refused", "failing": "refused", "absent": "missing",
        }  # fmt: skip
        assert "against float64" in rows["wrong"]["reason"]
        assert rows["failing"]["reason"] == "RuntimeError: no kernel image"
        assert rows["absent"]["reason"] == "No module named 'absent'"
        assert "interpreted" in rows["triton"]["reason"]
        assert "seconds" not in rows["wrong"]

    def test_rates_follow_from_the_cost(self, session: Session, quick: None) -> None:
        session.__dict__["timer"] = FakeTimer(lambda: 1e-6)
        rows = kernels.kernel_rows(rms_norm, SIZE, session)
        eager = {r["pass"]: r for r in rows if r["contender"] == "eager"}
        assert [eager[name]["seconds"] for name in ("forward", "backward", "both")] == [
            1e-6, 1e-6, 2e-6,
        ]  # fmt: skip
        num_bytes = 2 * 16 * 128 * 4
        assert eager["forward"]["gb_per_s"] == pytest.approx(num_bytes / 1e-6 / 1e9)
        assert eager["forward"]["sol_measured"] == pytest.approx(num_bytes / 1e11 / 1e-6)
        assert eager["forward"]["sol_datasheet"] == pytest.approx(num_bytes / 2e11 / 1e-6)
        # x and y, then x, dy and dx
        assert eager["both"]["sol_measured"] == pytest.approx(2.5 * num_bytes / 1e11 / 2e-6)
        assert eager["both"]["tflops"] == pytest.approx((4 + 10) * 16 * 128 / 2e-6 / 1e12)
        assert {r["contender"] for r in rows if r["auto"]} == {"eager"}
        assert eager["both"]["over_eager"] == 1.0
        assert eager["both"]["over_peer"] is None

    def test_without_a_gradient_there_is_one_pass(self, session: Session, quick: None) -> None:
        session.__dict__["timer"] = FakeTimer()
        rows = kernels.kernel_rows(REGISTRY["newton_schulz"], SIZE, session)
        assert {(r["pass"], r["whole"]) for r in rows} == {("forward", True)}

    def test_implementations_that_cannot_run_say_why(self) -> None:
        found = {c.name: c for c in contenders(REGISTRY["attention"], CPU, torch.float32)}
        assert (found["sdpa"].status, found["sdpa"].reason) == ("timed", "")
        assert found["flex"].status == "missing"
        assert "CUDA" in found["flex"].reason


def unguarded_peer(op: Any, name: str, device: torch.device) -> Any:
    """A peer that may run on the CPU."""
    from bench.contenders import PEER, Contender

    try:
        return Contender(name, PEER, peers.PEERS[op.name][name]())
    except ImportError as error:
        return Contender(name, PEER).out("missing", str(error))


class TestRows:
    def test_a_second_measurement_replaces_the_first(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "kernels.json"
        save(path, [row(samples=[1.0]), row(contender="eager")])
        save(path, [row(seconds=2e-3, gemm_flops=float("nan"), samples=[2.0])])
        rows = {r["contender"]: r for r in load(path)}
        assert len(rows) == 2
        assert rows["triton"]["seconds"] == 2e-3
        assert rows["triton"]["gemm_flops"] is None
        assert "samples" not in rows["triton"]
        assert len(load(tmp_path)) == 2

    def test_what_is_no_rows_file_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "table.json").write_text('{"rms_norm.forward": []}')
        with pytest.raises(ValueError, match="holds no benchmark rows"):
            load(tmp_path / "table.json")
        with pytest.raises(ValueError, match="no benchmark rows under"):
            load(tmp_path)
        with pytest.raises(ValueError, match="does not exist"):
            load(tmp_path / "absent.json")

    def test_auto_must_pick_the_fastest(self) -> None:
        eager = row(contender="eager", role="eager", seconds=2e-3)
        peer = row(contender="liger", role="peer", seconds=1e-9)  # not ours to pick
        forward = row(contender="other", seconds=1e-9, whole=False)
        assert auto_losses([row(auto=True), eager, peer, forward]) == []
        assert auto_losses([row(auto=True, seconds=2.05e-3), eager]) == []  # noise
        (line,) = auto_losses([row(auto=True, seconds=3e-3), eager])
        assert line == "rms_norm d12 bfloat16: auto picks triton, 1.50 times the time of eager"
        (line,) = auto_losses([row(auto=True, status="refused", reason="wrong"), eager])
        assert line.endswith("auto picks triton, which was refused: wrong")


class TestReport:
    def test_tables_plots_and_what_is_missing(self, tmp_path: Path) -> None:
        config = {"rms_norm.forward 768": {"BLOCK_ROWS": 4, "num_warps": 8}}
        step = row(
            kind="train_step", op="train_step", contender="auto", tokens=65_536,
            tokens_per_second=123_456.0, mfu_causal=0.5, mfu_nanochat=0.6, gemm_share_causal=0.7,
            gemm_share_nanochat=0.8, peak_bytes=2**31, micro_batch_tokens=32_768,
        )  # fmt: skip
        peer = row(contender="quack", role="peer", status="missing", reason="not | installed")
        save(tmp_path / "kernels.json", [row(auto=True, config=config), peer])
        save(tmp_path / "train_step.json", [step])
        report.main([str(tmp_path)])
        text = (tmp_path / "report.md").read_text()
        assert "| triton (auto) " in text
        assert "50.0/25.0" in text
        assert "rms_norm.forward 768: BLOCK_ROWS=4 num_warps=8" in text
        assert "123,456" in text
        assert "50.0/60.0" in text
        assert "70.0/80.0" in text
        assert "32,768" in text
        assert "quack is missing: not | installed" in text
        assert (tmp_path / "rms_norm.png").read_bytes()[:4] == b"\x89PNG"
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        assert all(line.endswith("|") for line in lines)

    def test_a_cpu_says_that_it_is_one(self) -> None:
        assert "Small shapes on a CPU" in markdown([row(gpu="none")])
        assert "Small shapes on a CPU" not in markdown([row()])


class TestCompare:
    def run(self, tmp_path: Path, before: Any, after: Any) -> int:
        for name, rows in (("a.json", before), ("b.json", after)):
            (tmp_path / name).unlink(missing_ok=True)
            save(tmp_path / name, rows)
        return compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])

    def test_a_loss_of_ours_fails(self, tmp_path: Path, capsys: Any) -> None:
        assert self.run(tmp_path, [row()], [row(seconds=1.06e-3)]) == 1
        assert "LOSS rms_norm d12 bfloat16 both triton: 1.060 times" in capsys.readouterr().out
        assert self.run(tmp_path, [row()], [row(seconds=1.04e-3)]) == 0
        assert self.run(tmp_path, [row()], [row(status="refused", reason="NaN")]) == 1
        eager = row(contender="eager", role="eager")
        assert self.run(tmp_path, [eager], [eager | {"seconds": 5.0}]) == 0

    def test_other_devices_and_nothing_in_common_are_refused(
        self, tmp_path: Path, capsys: Any
    ) -> None:
        assert self.run(tmp_path, [row()], [row(gpu="NVIDIA H100 80GB HBM3")]) == 2
        assert "different devices" in capsys.readouterr().err
        cpus = [row(gpu="none"), row(gpu="none", cpu="b")]
        assert self.run(tmp_path, cpus[:1], cpus[1:]) == 2
        assert self.run(tmp_path, [row()], [row(op="relu2_mlp")]) == 2


class TestTune:
    SHIPPED = {"BLOCK_ROWS": 4, "num_warps": 4, "num_stages": 1}

    def test_the_grid_starts_at_home_and_moves_out(self) -> None:
        grid = candidates(self.SHIPPED)
        assert grid[0] == self.SHIPPED
        changes = [sum(e[k] != self.SHIPPED[k] for k in e) for e in grid]
        assert changes == sorted(changes)
        assert {e["BLOCK_ROWS"] for e in grid} == {2, 4, 8}
        assert {e["num_stages"] for e in grid} == {1, 2}
        assert len(grid) == 3 * 3 * 2
        assert {e["ADD"] for e in candidates({"ADD": 7})} == {7}

    def test_measured_entries_lead_by_size_and_replace_their_like(self) -> None:
        shipped = [{"up_to": 1024, "BLOCK_ROWS": 4, "origin": "not measured"}]
        entries: list[dict[str, Any]] = shipped
        for size, block in ((1280, 1), (768, 2), (768, 8)):
            tuned = {"up_to": size, "element_size": 2, "BLOCK_ROWS": block, "origin": "measured"}
            entries = with_measured(entries, tuned)
        found = [(e["up_to"], e["BLOCK_ROWS"]) for e in entries]
        assert found == [(768, 8), (1280, 1), (1024, 4)]

    def test_a_new_table_keeps_the_generic_entries_behind(self, tmp_path: Path) -> None:
        tuned = {"up_to": 768, "element_size": 2, "BLOCK_ROWS": 8, "origin": "measured"}
        write_entry(tmp_path, "sm_90", "rms_norm.forward", tuned)
        written = json.loads((tmp_path / "sm_90.json").read_text())
        shipped = json.loads((launch.TABLES / "sm_90.json").read_text())
        assert written["rms_norm.forward"][0] == tuned
        assert written["rms_norm.forward"][1:] == FORWARD.default
        others = shipped.keys() - {"rms_norm.forward"}
        assert {name: written[name] for name in others} == {name: shipped[name] for name in others}

    def test_every_kernel_is_tuned_where_it_works_hardest(self) -> None:
        ops = [operations()[name] for name in ("rms_norm", "add_rms_norm")]
        found = tasks(ops, [WORKLOADS["d12"]], "sm_90", torch.bfloat16)
        assert {
            (t.use.config.kernel, t.use.size, t.use.element_size, t.op.name, t.passes)
            for t in found
        } == {
            ("rms_norm.forward", 768, 2, "add_rms_norm", 1),
            ("rms_norm.backward", 768, 2, "add_rms_norm", 2),
        }

    def tuned(self, monkeypatch: Any, cost_of: Any, faults: str = "") -> Any:
        """What tuning gives where a configuration takes cost_of(it) seconds."""
        current: dict[str, Any] = {}

        def call(x: Tensor) -> Tensor:
            current.update(FORWARD.choose(x, x.shape[-1]))
            if current["num_warps"] == 8:
                raise RuntimeError("out of resources")
            wrong = current["BLOCK_ROWS"] == 8
            return rms_norm.reference(x) * (2 if wrong else 1)

        monkeypatch.setitem(
            rms_norm.implementations,
            "triton",
            replace(rms_norm.implementations["triton"], call=call),
        )
        monkeypatch.setattr(Tuner, "faults", lambda self, task, entry: faults)
        task = Task(Use(FORWARD, 128, 4, True, self.SHIPPED), rms_norm, "triton", SIZE)
        tuner = Tuner("generic", CPU, torch.float32, FakeTimer(lambda: cost_of(current)))
        entry = tuner.tune(task, 60.0)
        assert FORWARD.entries("generic") is FORWARD.default
        return entry, tuner.log

    def test_the_fastest_right_candidate_wins(self, quick: None, monkeypatch: Any) -> None:
        entry, log = self.tuned(
            monkeypatch, lambda e: 1e-6 * (10 - e["BLOCK_ROWS"] + e["num_warps"] - e["num_stages"])
        )
        # eight rows err and eight warps fail, however fast they are
        assert {k: entry[k] for k in self.SHIPPED} == {
            "BLOCK_ROWS": 4, "num_warps": 2, "num_stages": 2,
        }  # fmt: skip
        assert (entry["up_to"], entry["element_size"]) == (128, 4)
        assert "6.0 us for rms_norm tiny forward, 9.0 us before" in entry["origin"]
        results = [item["result"] for item in log]
        assert any("against float64" in text for text in results)
        assert any("out of resources" in text for text in results)

    def test_no_gain_or_a_fault_keeps_the_shipped_one(self, quick: None, monkeypatch: Any) -> None:
        assert self.tuned(monkeypatch, lambda e: 1e-6)[0] is None
        nearly = self.tuned(monkeypatch, lambda e: 1e-6 * (0.99 if e["num_warps"] == 2 else 1))
        assert nearly[0] is None
        gate = self.tuned(monkeypatch, lambda e: 1e-6 * e["num_warps"], faults="3 spills")
        assert gate[0] is None

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
    def test_without_a_gpu_nothing_is_tuned(self) -> None:
        with pytest.raises(SystemExit, match="measures on a GPU"):
            tune.main(["--op", "rms_norm"])


class TestTrainStep:
    SIZE = replace(SMALL_SIZE, length=16, vocab_size=64)

    def bench(self, session: Session, size: Size = SIZE) -> train_steps.Bench:
        return train_steps.Bench(size, session)

    def test_variants_share_weights_and_agree(self, session: Session) -> None:
        variants = [
            Variant("sdpa", "eager", spec="reference,attention=sdpa"),
            Variant("reference", "reference", spec="reference"),
            Variant("rms_norm=nothing", spec="rms_norm=nothing"),
        ]
        found = session.once(
            "tiny", "train_step.json", lambda: train_steps.measured(self.SIZE, session, variants)
        )
        rows = {contender: r for (_, contender), r in found.items()}
        assert rows["rms_norm=nothing"]["status"] == "missing"
        assert rows["reference"]["kernels"]["attention"] == "reference"
        timed = rows["sdpa"]
        assert timed["rounds"] == train_steps.TURNS * train_steps.STEPS
        assert timed["tokens_per_second"] == pytest.approx(64 / timed["seconds"])
        assert timed["mfu_nanochat"] > timed["mfu_causal"] > 0
        assert timed["gemm_share_causal"] == pytest.approx(2 * timed["mfu_causal"])
        assert timed["over_eager"] == 1.0
        assert session.out is not None
        assert {r["contender"] for r in load(session.out / "train_step.json")} == set(rows)

    def test_micro_batches_halve_until_they_fit(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, tried = train_steps.train_step, []

        def small_memory(model: Any, optimizers: Any, batches: Any, runtime: Any) -> Any:
            tried.append(len(batches[0][0]))
            if tried[-1] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, optimizers, batches, runtime)

        monkeypatch.setattr(train_steps, "train_step", small_memory)
        variant = Variant("sdpa", "eager", spec="reference,attention=sdpa")
        (found,) = self.bench(session).measure([variant])
        assert tried[:3] == [4, 2, 1]
        assert found["micro_batch_tokens"] == 16

    def test_another_loss_is_refused(self, session: Session) -> None:
        op = REGISTRY["rms_norm"]
        op.add("shifted", lambda x: op.reference(x) + 0.3)
        try:
            variants = [
                Variant("sdpa", "eager", spec="reference,attention=sdpa"),
                Variant("rms_norm=shifted", spec="reference,rms_norm=shifted"),
            ]
            _, wrong = self.bench(session).measure(variants)
        finally:
            del op.implementations["shifted"]
        assert wrong["status"] == "refused"
        assert wrong["reason"].startswith("loss ")


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"status": "refused"}, pytest.fail.Exception),
        ({"status": "refused", "role": "peer"}, pytest.skip.Exception),
        ({"status": "missing"}, pytest.skip.Exception),
    ],
)
def test_a_wrong_kernel_of_ours_fails_the_bench(
    fields: dict[str, str], outcome: type[BaseException], request: pytest.FixtureRequest
) -> None:
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as ended:
        replay(row(reason="errs", **fields), cast(Any, None), request)
    assert ended.type is outcome
    assert str(ended.value) == f"triton {fields['status']}: errs"


def test_peaks_of_an_unknown_machine_give_no_share(session: Session, quick: None) -> None:
    session.__dict__["ceilings"] = Ceilings(1e12, 1e11, None, None)
    session.__dict__["timer"] = FakeTimer()
    assert all(
        r["sol_datasheet"] is None
        for r in kernels.kernel_rows(rms_norm, SIZE, session)
        if "sol_datasheet" in r
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_one_failing_step_does_not_stop_the_gpu_script(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "bench/gpu.sh"
    script = tmp_path / "bench/gpu.sh"
    script.parent.mkdir()
    shutil.copy(source, script)
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '*get_device_name*) echo "fake-gpu" ;;\n'
        '*operations*) echo "one two three" ;;\n'
        '*ops=one*) echo "broke"; exit 3 ;;\n'
        "*ops=three*) echo \"ModuleNotFoundError: No module named 'tyro'\"; exit 2 ;;\n"
        '*) echo "ran $*" ;;\n'
        "esac\n"
    )
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    path = f"{python.parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "COMMIT": "abc", "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", script, "kernels", "tune"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "== one d20: status 3" in done.stdout
    assert "== two d20: status 0" in done.stdout
    assert "== three d20: left out, No module named 'tyro'" in done.stdout
    assert "ran -m bench.forecasts" in (tmp_path / "out/forecasts.md").read_text()
    assert "== tune: status 0" in done.stdout
    log = (tmp_path / "out/log.txt").read_text()
    assert "--commit=abc" in log
    assert f"--out={tmp_path / 'out'}" in log


def test_steps_of_the_gpu_script_fit_into_nine_minutes() -> None:
    """With every operation and every file of GPU tests; a device is lent for ten minutes a call."""
    root = Path(__file__).parents[2]
    script = (root / "bench/gpu.sh").read_text()
    files = [
        path
        for folder in ("tests", "experiments")
        for path in (root / folder).rglob("test_*.py")
        if ".".join(("mark", "gpu")) in path.read_text()
    ]
    of_files = len(files) * int(re.search(r'step "\$file" (\d+)', script)[1])  # pyright: ignore[reportOptionalSubscript]
    each_op = sum(map(int, re.findall(r"every_op d(?:20|12) (\d+)", script)))
    once = sum(
        map(int, re.findall(r"(?:measure \"train d\d+\"|step (?:tune|forecasts)) (\d+)", script))
    )
    assert of_files + len(operations()) * each_op + once <= 540


def test_forecasts_stand_beside_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    total = SimpleNamespace(seconds=1e-3)
    monkeypatch.setattr(forecasts, "forecast_op", lambda *arguments: total)
    row = {
        "kind": "kernel", "op": "rms_norm", "workload": "d20", "dtype": "bfloat16", "whole": True,
        "contender": "triton", "role": "ours", "status": "timed", "gpu": "NVIDIA H200",
        "seconds": 1.1e-3,
    }  # fmt: skip
    others = ({"gpu": "none"}, {"contender": "eager", "role": "eager"}, {"whole": False})
    rows = [row, row | {"seconds": 1.3e-3}, *(row | other for other in others)]
    near, far = forecasts.lines(rows)
    assert near == ["rms_norm", "d20", "triton", 1.0, 1.1, pytest.approx(1.1), ""]
    assert far[-1] == "more than 15% apart"


@pytest.mark.slow
def test_a_run_writes_rows_and_the_json_of_pytest_benchmark(tmp_path: Path) -> None:
    command = (
        f"python -m pytest bench/test_train_step.py --workloads=cpu-small --out={tmp_path} "
        f"--benchmark-json={tmp_path / 'plugin.json'} -q -p no:cacheprovider"
    )
    root = Path(__file__).parents[2]
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command.split()[1:]],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "## Optimizer step of cpu-small" in done.stdout
    rows = {r["contender"]: r for r in load(tmp_path / "train_step.json")}
    assert {"sdpa", "auto", "reference"} <= rows.keys()
    plugin = json.loads((tmp_path / "plugin.json").read_text())["benchmarks"]
    medians = {b["extra_info"]["contender"]: b["stats"]["median"] for b in plugin}
    assert medians["sdpa"] == pytest.approx(rows["sdpa"]["seconds"])


def test_cost_of_every_operation_takes_its_workload() -> None:
    for op in operations().values():
        arguments = op.workload(WORKLOADS["d12"], torch.device("meta"), torch.bfloat16)
        assert isinstance(op.cost(*arguments), Cost)
        assert op.cost(*arguments).bytes > 0
