"""A run foreseen, the script that prints it, and the configs that carry its forecasts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dev import forecasts
from nanochat import hardware
from nanochat.kernels.registry import REGISTRY, operations
from nanochat.profiler.activations import Setup
from nanochat.profiler.footprint import footprint
from nanochat.profiler.forecast import Span
from nanochat.profiler.plan import HEADROOM, Run, foresee_kernels, make_plan, usable_bytes
from nanochat.train.run import model_config
from tests.profiler.test_footprint import FUSED
from tests.support.runs import ROOT, run_here

H100 = hardware.lookup("H100")
assert H100 is not None


def run_of(depth: int = 12, total: int = 524_288, ranks: int = 1) -> Run:
    setup = Setup(model_config(depth, -1, 2048, 65_536), 1, FUSED, world_size=ranks)
    return Run(setup, total, 1000)


@given(st.integers(2, 24), st.sampled_from([1, 2, 8]), st.floats(4, 200))
def test_the_largest_batch_fits_and_the_next_does_not(depth: int, ranks: int, gib: float) -> None:
    run, usable = run_of(depth, ranks=ranks), usable_bytes(gib)
    batch = run.largest_batch(usable)
    sizes = run.batch_sizes()
    if batch is not None:
        assert footprint(run.with_batch(batch)).total * HEADROOM <= usable
    larger = [size for size in sizes if batch is None or size > batch]
    if larger:
        assert footprint(run.with_batch(larger[0])).total * HEADROOM > usable
    for size in sizes:
        setup = run.with_batch(size)
        assert size * 2048 * ranks * setup.micro_batches == run.total_batch_size


def test_a_step_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="--total_batch_size=522240"):
        run_of(ranks=3).batch_sizes()
    with pytest.raises(ValueError, match="another --device_batch_size"):
        make_plan(run_of(), H100, 7)


def test_hours_and_cost() -> None:
    plan = make_plan(run_of(ranks=8), H100)
    assert plan.fits
    assert plan.hours is not None
    assert plan.slow is not None
    assert plan.hours.slow == pytest.approx(1000 * plan.slow.total / 3600)
    assert plan.tokens_per_second is not None
    assert plan.tokens_per_second.slow == pytest.approx(524_288 / plan.slow.total)
    assert plan.dollars(2.0) == Span(plan.hours.slow * 16, plan.hours.fast * 16)
    low, high = H100.rental or (0, 0)
    assert plan.dollars() == Span(plan.hours.slow * 8 * high, plan.hours.fast * 8 * low)
    assert make_plan(run_of(), replace(H100, rental=None)).dollars() is None


def test_what_does_not_fit_has_no_speed() -> None:
    plan = make_plan(run_of(24), H100, memory_gib=8)
    assert not plan.fits
    assert plan.setup.device_batch_size == 1
    assert plan.hours is None
    assert plan.dollars(2.0) is None


def test_kernels_are_foreseen_and_not_chosen() -> None:
    operations()
    before = {name: op.selected for name, op in REGISTRY.items()}
    blackwell = hardware.lookup("RTX 5090")
    assert blackwell is not None
    chosen = foresee_kernels("auto", blackwell)
    assert chosen["linear_cross_entropy"] == "triton"
    assert chosen["relu2_mlp"].startswith("triton")
    assert set(foresee_kernels("reference", H100).values()) == {"reference"}
    assert foresee_kernels("triton,attention=sdpa", H100)["relu2_mlp"] == "triton"
    with pytest.raises(ValueError, match="unknown implementation 'tritn'"):
        foresee_kernels("tritn", H100)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="attention=fa3 cannot run on cuda"):
            foresee_kernels("attention=fa3", H100)
    assert {name: op.selected for name, op in REGISTRY.items()} == before


def plan_script(tmp_path: Path, arguments: str) -> str:
    return run_here(tmp_path, f"python -m scripts.plan {arguments}")


def test_every_gpu_has_a_row_and_every_table_says_forecast(tmp_path: Path) -> None:
    said = plan_script(tmp_path, "--depth=12 --num_gpus=8")
    for gpu in hardware.GPUS:
        assert f"| {gpu.alias or gpu.name} " in said
    said += plan_script(tmp_path, "--depth=4 --max_seq_len=128 --vocab_size=512 --gpu=H100 --count")
    lines = said.splitlines()
    heads = [lines[i] for i, line in enumerate(lines[1:]) if re.match(r"\|-+\|", line)]
    assert len(heads) == 4
    assert all("forecast" in head for head in heads)
    assert said.count("Assumptions:") == 2


def test_counted_is_what_was_foreseen(tmp_path: Path) -> None:
    said = plan_script(
        tmp_path, "--depth=4 --max_seq_len=128 --vocab_size=512 --total_batch_size=512 --gpu=H100 "
        "--device_batch_size=2 --count",
    )  # fmt: skip
    row = next(line for line in said.splitlines() if line.startswith("| all "))
    foreseen, counted = (float(cell.replace(",", "")) for cell in row.split("|")[2:4])
    assert foreseen == pytest.approx(counted, rel=0.01)


def test_json_holds_the_plan(tmp_path: Path) -> None:
    (record,) = json.loads(plan_script(tmp_path, "--depth=20 --gpu=H100 --num_gpus=8 --json"))
    assert record["kind"] == "forecast"
    assert record["parameters"]["total"] == 560_988_160
    assert record["num_iterations"] == 21_400
    assert record["hours"][0] > record["hours"][1]
    assert record["memory"]["total"] == sum(record["memory"]["peak"].values())
    assert record["assumptions"]


def test_targets_sort_and_budgets_limit(tmp_path: Path) -> None:
    records = json.loads(plan_script(tmp_path, "--target=dollars --json --depth=12"))
    slow = [record["dollars"][0] if record["dollars"] else float("inf") for record in records]
    assert slow == sorted(slow)
    assert slow[0] < slow[-1] == float("inf")
    words = "--target=hours --budget=2 --gpu=H100 --num_gpus=8 --json"
    (within,) = json.loads(plan_script(tmp_path, words))
    assert within["hours"][0] <= 2
    deeper = f"--gpu=H100 --num_gpus=8 --json --depth={within['depth'] + 1}"
    assert json.loads(plan_script(tmp_path, deeper))[0]["hours"][0] > 2
    assert "No depth fits" in plan_script(tmp_path, "--target=hours --budget=0.0001 --gpu=L4")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--target=bpb", "is not known yet"),
        ("--budget=3", "--target=hours or --target=dollars"),
        ("--count", "name it with --gpu"),
        ("--gpu='RTX 5091'", "did you mean 'RTX 5090'?"),
        ("--num_gpus=3", "--total_batch_size=522240"),
        ("--device_batch_size=0", "at least 1, or auto"),
        ("--kernels=tritn", "did you mean 'triton'?"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: str, part: str) -> None:
    with pytest.raises(SystemExit, match=r"^2: ") as leaving:
        plan_script(tmp_path, arguments)
    assert part in str(leaving.value)


def test_carried_forecasts_are_the_planners() -> None:
    """In docs/plan.md and in every config for two GPUs, each for that very config."""
    stale = []
    for path in forecasts.carriers():
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        found = forecasts.CARRIED.findall(text)
        assert found, f"{name} carries no forecast"
        assert path.suffix == ".md" or f"scripts.plan {name} " in found[0]
        if text != forecasts.renewed(text):
            stale.append(name)
    assert not stale, f"run python -m dev.forecasts --write: {stale}"
    assert len(forecasts.carriers()) >= 6


def test_a_wrong_forecast_is_renewed() -> None:
    command = "$ python -m scripts.plan --depth=12 \\\n    --gpu=H100"
    renewed = forecasts.renewed(f"{command}\nforecast: none\nmore")
    assert renewed.startswith(f"{command}\nforecast: batch ")
    assert renewed.endswith(" hours\nmore")
