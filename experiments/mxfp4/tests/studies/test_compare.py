"""A comparison trains its cells once, and its report is made of them."""

import json
from pathlib import Path

import pytest
from filelock import FileLock

from experiments.mxfp4.studies import report
from tests.support.runs import make_base_dir, run_here

COMPARE = (
    "python -m experiments.mxfp4.studies.compare --device=cpu --depth=1 --max_seq_len=32 "
    "--device_batch_size=2 --num_iterations=3 --eval_tokens=128 --cells=mxfp4_rht_sr"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_dir(tmp_path_factory.mktemp("compare"))


def compare(base: Path, *more: str) -> str:
    return run_here(base, COMPARE, f"--data_dir={base / 'text'}", *more)


@pytest.fixture(scope="module")
def cells(base: Path) -> Path:
    compare(base, f"--output={base / 'cells'}", "--seeds=2")
    return base / "cells"


@pytest.mark.long
def test_every_cell_is_one_file(cells: Path) -> None:
    names = sorted(path.name for path in cells.glob("*.json"))
    wanted = [f"{name}_seed{seed}.json" for name in ("mxfp4_rht_sr", "plain") for seed in (0, 1)]
    assert names == wanted
    cell = json.loads((cells / wanted[0]).read_text())
    assert (cell["tokens"], cell["path"], cell["signs"]) == (192, "emulate", "random")
    assert cell["products"]["fprop"] is None
    assert "stochastic hadamard" in cell["products"]["wgrad"]
    assert cell["bpb"] < 20
    plain = json.loads((cells / wanted[2]).read_text())
    assert plain["first_loss"] == pytest.approx(cell["first_loss"]), "the same weights and text"
    assert plain["bpb"] != cell["bpb"]


def test_a_stopped_comparison_goes_on(base: Path, cells: Path) -> None:
    """Cells that are there stay as they are; the one that is missing comes out the same."""
    before = {path.name: path.read_bytes() for path in cells.glob("*.json")}
    gone = json.loads((cells / "mxfp4_rht_sr_seed1.json").read_text())
    (cells / "mxfp4_rht_sr_seed1.json").unlink()
    said = compare(base, f"--output={cells}", "--seeds=2")
    assert said.count("| validation bpb") == 1
    again = json.loads((cells / "mxfp4_rht_sr_seed1.json").read_text())
    assert (again["bpb"], again["train_loss"]) == (gone["bpb"], gone["train_loss"])
    for name in before.keys() - {"mxfp4_rht_sr_seed1.json"}:
        assert (cells / name).read_bytes() == before[name]


def test_a_cell_of_another_process_is_left_to_it(base: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".mxfp4_rht_sr_seed0.lock"):
        said = compare(base, f"--output={tmp_path}", "--seeds=1")
    assert "mxfp4_rht_sr     seed 0 | another process trains it" in said
    assert [path.name for path in tmp_path.glob("*.json")] == ["plain_seed0.json"]


def test_cells_of_other_settings_are_not_mixed(base: Path, cells: Path) -> None:
    with pytest.raises(SystemExit, match=r"is of other settings.*choose another --output"):
        compare(base, f"--output={cells}", "--num_iterations=4")


def test_the_report_of_those_cells(cells: Path) -> None:
    report.main([str(cells)])
    text = (cells / "report.md").read_text()
    assert "| mxfp4_rht_sr | emulated |" in text
    assert "192 tokens" in text
    assert (cells / "delta_bpb.png").stat().st_size > 1000
