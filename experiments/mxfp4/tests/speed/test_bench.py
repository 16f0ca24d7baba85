"""The benchmark, as far as a machine without a GPU goes."""

import subprocess
from pathlib import Path

import pytest
import torch

from experiments.mxfp4.layers.recipes import RECIPES
from experiments.mxfp4.speed import bench, forecast

ROOT = Path(__file__).resolve().parents[4]


CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of one layer: the interpreter is slow."""
    monkeypatch.setattr(forecast, "linear_layers", lambda depth: [forecast.Layer(64, 32)])
    monkeypatch.setattr(bench, "LAYERS", ("mx8f_mx4b", "quartet_even"))
    monkeypatch.setattr(bench, "QUANTIZERS", ("mxfp4", "mxfp4 rceil stochastic hadamard"))


@pytest.mark.long
@pytest.mark.usefixtures("small")
def test_every_case_runs() -> None:
    """In the interpreter, at sizes that fit it: a case that fails would cost a GPU's owner."""
    cases = [
        *bench.gemm_cases([(32, 32, 64)], CPU),
        *bench.quantize_cases(32, 64, CPU),
        *bench.layer_cases(1, 32, CPU),
    ]
    rows = bench.measure(cases, lambda run: (run(), 0.5)[1])
    assert {row["kind"] for row in rows} == {"gemm", "quantize", "linear"}
    by_name = {(row["kind"], row["name"]): row for row in rows}
    assert by_name["gemm", "mxfp4"]["tflops"] == 2 * 32 * 32 * 64 / 0.5 / 1e12
    moved = 32 * 64 * (2 + 2 * 4.25 / 8)
    assert by_name["quantize", "mxfp4: rows and columns"]["gb_per_s"] == moved / 0.5 / 1e9
    assert by_name["linear", "quartet_even"]["tflops"] == 6 * 32 * 64 * 32 / 0.5 / 1e12


@pytest.mark.usefixtures("small")
def test_decoding_runs() -> None:
    rows = bench.measure(bench.decode_cases(1, CPU), lambda run: (run(), 0.5)[1])
    bfloat16, fp4 = (row["gb_per_s"] for row in rows)
    assert bfloat16 / fp4 == pytest.approx(16 / 4.25)


@pytest.mark.long
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", "experiments/mxfp4/speed/bench_sm120.sh"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={"OUT": str(tmp_path / "out"),
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "nothing to measure here: no CUDA GPU" in result.stderr
    assert not (tmp_path / "out").exists()


def test_layers_of_the_benchmark_are_recipes() -> None:
    assert set(bench.LAYERS) <= set(RECIPES)
    assert {"mxfp4_rtn", "mx8f_mx4b"} <= set(bench.LAYERS)
