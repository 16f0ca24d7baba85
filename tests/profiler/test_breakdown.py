"""The record of a profile and its tables: rates, shares, MFU and HFU by hand."""

import json
from collections import Counter

import pytest

from nanochat import report
from nanochat.kernels.registry import Cost
from nanochat.profiler import breakdown
from nanochat.profiler.capture import Captured, Tally
from nanochat.profiler.throughput import Meter, Peaks
from nanochat.profiler.timeline import Division

MS = 10**6  # nanoseconds


def captured() -> Captured:
    """Two steps of 10 ms."""
    times = {
        ("data", "other"): 2 * MS,
        ("forward", "rms_norm"): 4 * MS,
        ("backward", "rms_norm"): 8 * MS,
        ("optimizer", "Muon"): 3 * MS,
        ("communication", "communication"): 1 * MS,
        ("idle", "forward"): 2 * MS - 1000,
        ("forward", "tiny"): 1000,
    }
    tally = Tally()
    for _ in range(2):
        # 1 GFLOP and 2 MB forward, 3 GFLOPs and 40 MB backward
        tally.add("rms_norm", Cost(1e9, 2e6, Cost(3e9, 4e7)))
    top = {"gemm": (6 * MS, 4)}
    return Captured(Division(2, Counter(times), top, [3 * MS, 5]), tally, [0.010, 0.010])


def a_record(datasheet: float | None = None, compiled: bool = False, device: str = "cpu") -> dict:
    meter = Meter(1000, 1_500_000, 2_000_000, Peaks(datasheet, 1e12), 1, 10)
    ceilings = breakdown.Ceilings(1e12, 1e10)
    names = device, "A device", "float32"
    return breakdown.breakdown(captured(), meter, ceilings, [0.008, 0.1, 0.007], *names, compiled)


def test_rates_are_those_of_one_step() -> None:
    rows = {(r["category"], r["operation"]): r for r in a_record()["operations"]}
    forward, backward = rows["forward", "rms_norm"], rows["backward", "rms_norm"]
    assert forward["seconds"] == pytest.approx(0.002)
    assert forward["calls"] == 1
    assert forward["flops"] / forward["seconds"] == pytest.approx(5e11)
    # 1 GFLOP at 1 TFLOP/s takes 1 ms, 2 MB at 10 GB/s 0.2 ms: bound by compute, at half its speed
    assert forward["speed_of_light"] == pytest.approx(0.5)
    # 40 MB take 4 ms: bound by memory, at its speed
    assert backward["speed_of_light"] == pytest.approx(1.0)
    assert "calls" not in rows["optimizer", "Muon"]


def test_mfu_by_both_formulas_and_hfu_by_what_ran() -> None:
    record = a_record(datasheet=2e12)
    seconds = 0.008  # of the steps before the profile, whose own cost time
    assert record["unprofiled_step_seconds"] == seconds
    assert record["mfu_causal_of_gemm"] == pytest.approx(1000 / seconds * 1.5e6 / 1e12)
    assert record["mfu_nanochat_of_datasheet"] == pytest.approx(1000 / seconds * 2e6 / 2e12)
    assert record["hfu_of_gemm"] == pytest.approx(4e9 / seconds / 1e12)
    assert a_record()["mfu_causal_of_datasheet"] is None
    assert a_record(compiled=True)["hfu_of_gemm"] is None


def test_tables_hold_every_millisecond() -> None:
    overview, stages, operations, top = breakdown.tables(a_record(datasheet=2e12))
    assert ("data", "1.00 ms", "10.0 %") in stages.rows
    assert ("together", "10.00 ms", "100.0 %") in stages.rows
    assert ("idle: Python between operations", "1.00 ms", "10.0 %") in stages.rows
    row = ("forward", "rms_norm", "2.00 ms", "20.0 %", "1", "500.0", "1.00", "50 %")
    assert row in operations.rows
    assert operations.rows[-1][1] == "1 smaller ones, each under 0.2 %"
    assert top.rows == [("gemm", "3.00 ms", "30.0 %", "2")]
    assert ("HFU, FLOPs of all operations, of the datasheet", "25.0 %") in overview.rows
    # the others of a stage without operations are in the table of stages alone
    assert [row[0] for row in operations.rows] == ["backward", "forward", "optimizer", ""]
    plain = next(row for row in overview.rows if row[0] == "step, median of those before")
    assert plain[1] == "8.00 ms; profiled ones took 25.0 % longer"
    text = breakdown.text(a_record())
    assert "of the datasheet" not in text
    assert "gaps between kernels" not in text
    assert "gaps between kernels" in breakdown.text(a_record(device="cuda"))
    assert "GPU kernels" in breakdown.text(a_record(device="cuda"))


def test_the_report_shows_them(tmp_path) -> None:
    line = {"kind": "profile", "stage": "base", "step": 3, "run": "a", **a_record()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert report.generate(tmp_path, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert "### Where the time of a step goes\n\n| stage | time | share |" in text
    assert "| forward | rms_norm | 2.00 ms | 20.0 % | 1 | 500.0 | 1.00 | 50 % |" in text
