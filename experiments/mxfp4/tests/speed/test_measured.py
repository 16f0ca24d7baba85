"""Measurements beside the forecast: from records of runs to the table of the README."""

import json
from pathlib import Path

import pytest

from experiments.mxfp4.speed import measured


def run_folder(tmp_path: Path, precision: dict, seconds: list[float]) -> Path:
    start = {"kind": "start", "stage": "base", "step": 0, "precision": precision}
    train = [
        {"kind": "train", "stage": "base", "step": i, "step_seconds": s,
         "tokens_per_second": 100 / s, "memory_gib": 2.0}
        for i, s in enumerate(seconds)
    ]  # fmt: skip
    tmp_path.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in (start, *train)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_table_is_filled_by_measurements_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = measured.markdown([])
    assert empty.count(measured.NOT_MEASURED) == len(measured.figures())
    plain = run_folder(tmp_path / "plain", {"name": "plain"}, [9.0] * 10 + [3.0, 3.0, 3.0])
    native = {"name": "mxfp4", "recipe": "mx8f_mx4b", "backend": "native"}
    fast = run_folder(tmp_path / "fast", native, [9.0] * 10 + [2.0, 2.0, 2.0])
    row = {"kind": "gemm", "name": "mxfp4", "shape": measured.LARGE_SHAPE, "tflops": 1001.4}
    (tmp_path / measured.BENCH).write_text(json.dumps({"rows": [row]}))
    measured.main([str(tmp_path), f"d12={plain}:{fast}"])
    filled = capsys.readouterr().out
    assert filled == measured.markdown(measured.read_rows(tmp_path))
    assert filled.count(measured.NOT_MEASURED) == len(measured.figures()) - 2
    (step,) = (line for line in filled.splitlines() if line.startswith("| training step d12"))
    assert step.endswith("| 1.50 |")
    assert "| 1,001 |" in filled


def test_emulated_runs_have_no_speed(tmp_path: Path) -> None:
    older = {"name": "mxfp4", "recipe": "mx8f_mx4b", "backend": "emulate"}
    for precision in (older, {"name": "other", "emulated": True}):
        folder = run_folder(tmp_path / precision["name"], precision, [1.0] * 20)
        with pytest.raises(ValueError, match="its time is no speed"):
            measured.step_row("d12", folder)
    short = run_folder(tmp_path / "short", {"name": "plain"}, [1.0] * 10)
    with pytest.raises(ValueError, match="10 steps; more than 10"):
        measured.step_row("d12", short)
