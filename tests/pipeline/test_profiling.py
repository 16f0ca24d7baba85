"""--profile in a training run, and scripts.profile_train."""

import json
from pathlib import Path

import pytest

from nanochat import report
from tests.support.runs import TINY, make_base_dir, records, run_here

TRAIN = "python -m scripts.base_train --eval_every=-1 --core_metric_every=-1"
PROFILE = "python -m scripts.profile_train --device=cpu --depth=1 --max_seq_len=16 --vocab_size=128"
SMALL = ("--device_batch_size=2", "--total_batch_size=32")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_dir(tmp_path_factory.mktemp("base"))


def test_a_profiled_run_trains_as_any_other(base_dir: Path) -> None:
    data = f"--data_dir={base_dir / 'text'}"
    more = ("--num_iterations=4",)
    run_here(base_dir, TRAIN, *TINY, data, *more, "--model_tag=plain")
    said = run_here(base_dir, TRAIN, *TINY, data, *more, "--model_tag=profiled", "--profile=2")
    folders = [base_dir / "base_checkpoints" / tag for tag in ("plain", "profiled")]
    plain, profiled = ([r["loss"] for r in records(folder, "train")] for folder in folders)
    assert profiled == plain, "a profile must not change what is trained"
    assert not (folders[0] / "profile").exists()
    (record,) = records(folders[1], "profile")
    assert record["steps"] == 2
    assert record["step"] == 3
    # one step before the warm-up: the first of the run, which says nothing about a steady one
    assert record["unprofiled_step_seconds"] is None
    measured = [r["step_seconds"] for r in records(folders[1], "train")][2:]
    assert record["step_seconds"] == pytest.approx(sum(measured) / 2, rel=1e-3)
    assert sum(record["categories"].values()) == pytest.approx(record["step_seconds"], rel=0.02)
    assert record["categories"]["data"] > 0
    assert "Operations of a step" in said
    assert (folders[1] / "profile" / "profile.txt").read_text().strip() in said
    assert (folders[1] / "profile" / "trace.json.gz").is_file()


def test_a_run_too_short_is_refused_and_a_resumed_one_is_not(base_dir: Path) -> None:
    data = f"--data_dir={base_dir / 'text'}", "--model_tag=short"
    with pytest.raises(SystemExit, match="--profile=3 needs a run of at least 4 steps"):
        run_here(base_dir, TRAIN, *TINY, *data, "--num_iterations=3", "--profile=3")
    assert not (base_dir / "base_checkpoints" / "short" / "metrics.jsonl").exists()
    run_here(base_dir, TRAIN, *TINY, *data, "--num_iterations=1")
    said = run_here(base_dir, TRAIN, *TINY, *data, "--num_iterations=2", "--resume", "--profile=3")
    assert "no profile: 1 steps are left" in said


def test_profile_train(base_dir: Path) -> None:
    said = run_here(base_dir, PROFILE, *SMALL, "--profile=1", "--num_iterations=5")
    folder = base_dir / "profiles" / "d1"
    seconds = [r["step_seconds"] for r in records(folder, "train", "profile_train")]
    assert len(seconds) == 5
    (record,) = records(folder, "profile", "profile_train")
    assert record["steps"] == 1
    assert record["step_seconds"] == pytest.approx(seconds[4])
    # neither the first step of the run nor the profiler's own first one is steady
    assert record["unprofiled_step_seconds"] == pytest.approx((seconds[1] + seconds[2]) / 2)
    assert "newton_schulz" in said
    assert not list(folder.glob("*/model.pt"))


def test_the_toggle_matrix(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.kernels.optional_triton.compile_refusal", lambda _: "no compiler")
    said = run_here(base_dir, PROFILE, *SMALL, "--toggles", "--rounds=1", "--model_tag=toggles")
    folder = base_dir / "profiles" / "toggles"
    (record,) = records(folder, "toggles", "profile_train")
    names = [row["name"] for row in record["toggles"]]
    assert names == ["all off = all on, no attention", "attention=sdpa = all on"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in record["toggles"])
    off, sdpa = record["toggles"]
    assert off["loss_difference"] == 0
    assert abs(sdpa["loss_difference"]) < 1e-3, "another order of sums, and nothing more"
    assert record["absent"]["compile"] == "no compiler"
    assert "thousands of times slower" in record["absent"]["rms_norm=triton"]
    assert "norm_rope=triton" not in record["absent"], "no part of a training step"
    assert (folder / "toggles.png").read_bytes().startswith(b"\x89PNG")
    assert "Not possible here" in said
    report.generate(base_dir / "profiles", base_dir / "out.md")
    text = (base_dir / "out.md").read_text()
    assert "## Profile of training steps" in text
    assert "| attention=sdpa = all on |" in text
    assert (base_dir / "profile_train_toggles.png").is_file()
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["kind"] == "start"
