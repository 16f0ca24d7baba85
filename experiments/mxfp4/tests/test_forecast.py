"""The forecast's arithmetic, and the benchmark as far as a machine without a GPU goes."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from experiments.mxfp4 import bench, forecast, measured, steps
from experiments.mxfp4.forecast import DATASHEET, DEPTHS, REACHED, Rates
from experiments.mxfp4.recipes import RECIPES, Product
from nanochat import hardware, scaling

ROOT = Path(__file__).resolve().parents[3]
FREE_MEMORY = Rates("no memory limit", 1.0, 2.0, 4.0, 1e30, "")
CPU = torch.device("cpu")


def test_without_a_memory_limit_a_recipe_gains_what_its_formats_gain() -> None:
    """fprop twice, dgrad and wgrad four times as fast: 3 / (1/2 + 1/4 + 1/4) = 3."""
    for name, ratio in (("mx8f_mx4b", 3.0), ("mxfp4_rtn", 4.0), ("mxfp8", 2.0),
                        ("mxfp4_rht_sr", 2.0), ("mxfp4_no_wgrad", 2.0)):  # fmt: skip
        got = forecast.ratios(name, FREE_MEMORY, forecast.WHAT[0])
        assert got == pytest.approx([ratio] * len(DEPTHS))


def test_the_head_and_attention_hold_a_step_back() -> None:
    """d12 by hand, in units of 2 x tokens x width: 36 depth of linear layers, 3 depth of the
    context for attention, 3 of the vocabulary."""
    width, depth = scaling.model_width(12), 12
    rest = 3 * forecast.VOCABULARY + 3 * depth * forecast.CONTEXT
    linear = 3 * 12 * width * depth
    want = (linear + rest) / (linear / 4 + rest)
    got = forecast.ratios("mxfp4_rtn", FREE_MEMORY, forecast.WHAT[1])[DEPTHS.index(12)]
    assert got == pytest.approx(want)
    with_head = forecast.ratios("mxfp4_rtn", FREE_MEMORY, forecast.WHAT[2])[DEPTHS.index(12)]
    want = (linear + rest) / (linear / 4 + rest - 1.5 * forecast.VOCABULARY)
    assert with_head == pytest.approx(want)


def test_bytes_of_a_product_and_of_a_quantizer() -> None:
    """With endless arithmetic only memory counts."""
    fast = Rates("memory alone", 1e30, 1e30, 1e30, 1.0, "")
    fp4 = Product.of("mxfp4")
    assert forecast.product_seconds(64, 32, 96, fp4, 2, fast) == pytest.approx(
        (64 * 96 + 32 * 96) * 4.25 / 8 + 64 * 32 * 2
    )
    assert forecast.product_seconds(64, 32, 96, None, 2, fast) == pytest.approx(
        2 * (64 * 96 + 32 * 96 + 64 * 32)
    )
    both = forecast.quantize_seconds(1000, 2, (fp4, Product.of("mxfp8_e4m3")), fast)
    assert both == pytest.approx(1000 * (2 + 4.25 / 8 + 8.25 / 8))
    assert forecast.quantize_seconds(1000, 2, (None, None), fast) == 0


def test_bytes_of_a_layer() -> None:
    """16 tokens, 32 inputs, 64 outputs; x and dy are read in 16 bits, W in 32, each once."""
    slow = Rates("memory alone", 1e30, 1e30, 1e30, 1.0, "")
    layer, tokens, codes = forecast.Layer(64, 32), 16, 4.25 / 8
    x, w, dy = tokens * layer.inputs, layer.outputs * layer.inputs, tokens * layer.outputs
    outputs = 2 * (dy + x) + 8 * w
    quantizers = x * (2 + 2 * codes) + w * (4 + 2 * codes) + dy * (2 + 2 * codes)
    got = forecast.layer_seconds(layer, RECIPES["mxfp4_rtn"], tokens, slow)
    assert got == pytest.approx(quantizers + 2 * codes * (x + w + dy) + outputs)
    got = forecast.layer_seconds(layer, None, tokens, slow)
    assert got == pytest.approx(6 * w + 2 * 2 * (x + w + dy) + outputs)


def test_gains_grow_with_depth_and_are_below_the_rates() -> None:
    for rates in (REACHED, DATASHEET):
        for name in forecast.SHOWN:
            for what in forecast.WHAT[:2]:
                ratios = forecast.ratios(name, rates, what)
                assert ratios == sorted(ratios)
                assert ratios[-1] < rates.fp4 / rates.bf16
    d8 = DEPTHS.index(8)
    step = forecast.ratios("mx8f_mx4b", REACHED, forecast.WHAT[1])
    assert step[d8 - 1] < 1.2, "below d8 four bits do not pay"


def test_rates_of_the_datasheet_are_the_ones_of_the_hardware_table() -> None:
    (gpu,) = (gpu for gpu in hardware.GPUS if gpu.name == "RTX 5090")
    assert DATASHEET.bf16 == gpu.bf16_flops
    assert DATASHEET.memory == gpu.memory_bytes_per_s


def test_the_forecast_says_what_it_is() -> None:
    text = forecast.markdown()
    assert "NOT MEASURED" in text.splitlines()[0]
    assert "not built" in text
    assert text.count("| mx8f_mx4b |") == 2 * len(forecast.WHAT)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of one layer: the interpreter is slow."""
    monkeypatch.setattr(forecast, "linear_layers", lambda depth: [forecast.Layer(64, 32)])
    monkeypatch.setattr(bench, "LAYERS", ("mx8f_mx4b", "quartet_even"))
    monkeypatch.setattr(bench, "QUANTIZERS", ("mxfp4", "mxfp4 rceil stochastic hadamard"))


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


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", "experiments/mxfp4/bench_sm120.sh"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={"OUT": str(tmp_path / "out"),
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "nothing to measure here: no CUDA GPU" in result.stderr
    assert not (tmp_path / "out").exists()


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


def test_the_table_is_filled_by_measurements_alone(tmp_path: Path) -> None:
    empty = measured.markdown([])
    assert empty.count(measured.NOT_MEASURED) == len(measured.figures())
    plain = run_folder(tmp_path / "plain", {"name": "plain"}, [9.0] * 10 + [3.0, 3.0, 3.0])
    native = {"name": "mxfp4", "recipe": "mx8f_mx4b", "backend": "native"}
    fast = run_folder(tmp_path / "fast", native, [9.0] * 10 + [2.0, 2.0, 2.0])
    steps.main(["--output", str(tmp_path / measured.STEPS), f"d12={plain}:{fast}"])
    row = {"kind": "gemm", "name": "mxfp4", "shape": measured.LARGE_SHAPE, "tflops": 1001.4}
    (tmp_path / measured.BENCH).write_text(json.dumps({"rows": [row]}))
    filled = measured.markdown(measured.read_rows(tmp_path))
    assert filled.count(measured.NOT_MEASURED) == len(measured.figures()) - 2
    (step,) = (line for line in filled.splitlines() if line.startswith("| training step d12"))
    assert step.endswith("| 1.50 |")
    assert "| 1,001 |" in filled


def test_emulated_runs_have_no_speed(tmp_path: Path) -> None:
    emulated = {"name": "mxfp4", "recipe": "mx8f_mx4b", "backend": "emulate"}
    folder = run_folder(tmp_path / "run", emulated, [1.0] * 20)
    with pytest.raises(ValueError, match="its time is no speed"):
        steps.step_row("d12", folder)
    short = run_folder(tmp_path / "short", {"name": "plain"}, [1.0] * 10)
    with pytest.raises(ValueError, match="10 steps; more than 10"):
        steps.step_row("d12", short)


def test_layers_of_the_benchmark_are_recipes() -> None:
    assert set(bench.LAYERS) <= set(RECIPES)
    assert {"mxfp4_rtn", "mx8f_mx4b"} <= set(bench.LAYERS)
