"""A comparison's cells and its report; tables of quantization errors; the stored results."""

import json
import math
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from experiments.mxfp4 import error_tables, forecast, measured, report
from experiments.mxfp4.cells import CELLS
from experiments.mxfp4.report import Difference, by_name, difference, markdown, read_cells
from tests.support.runs import ROOT, make_base_dir, run_here

RESULTS = ROOT / "experiments" / "mxfp4" / "results"
README = ROOT / "experiments" / "mxfp4" / "README.md"
COMPARE = (
    "python -m experiments.mxfp4.compare --device=cpu --depth=1 --max_seq_len=32 "
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
    with pytest.raises(ValueError, match=r"is of other settings.*choose another --output"):
        compare(base, f"--output={cells}", "--num_iterations=4")


def test_the_report_of_those_cells(cells: Path) -> None:
    report.main([str(cells)])
    text = (cells / "report.md").read_text()
    assert "| mxfp4_rht_sr | emulated |" in text
    assert "192 tokens" in text
    assert (cells / "delta_bpb.png").stat().st_size > 1000


def cell(name: str, seed: int, bpb: float, path: str = "emulate") -> report.Cell:
    return {
        "cell": name, "seed": seed, "path": "plain" if name == "plain" else path, "bpb": bpb,
        "products": {"fprop": None, "dgrad": None, "wgrad": "mxfp4 even nearest | mxfp4 even"},
        "signs": "fixed", "quest": False, "flop_shares": {f"mxfp4 {path}": 0.25, "float32": 0.75},
        "tokens": 1000, "seconds": 2.0, "vocab_size": 10, "dtype": "float32", "threads": 1,
        "num_params": 5,
        "settings": {"depth": 2, "max_seq_len": 8, "num_iterations": 3, "device_batch_size": 2,
                     "micro_batches": 1, "data_dir": "", "dataset": "x", "eval_tokens": 7},
        "environment": {"torch": "2", "commit": "abc", "dirty": False,
                        "hardware": {"cpu": "a CPU", "gpus": []}},
    }  # fmt: skip


def made(*values: tuple[str, list[float]], path: str = "emulate") -> list[report.Cell]:
    return [cell(name, s, bpb, path) for name, each in values for s, bpb in enumerate(each)]


def test_differences_are_of_pairs_of_one_seed() -> None:
    """The spread between seeds, large here, is in both; what remains is 0.1 +- 0.01."""
    named = by_name(made(("plain", [1.0, 2.0, 3.0]), ("mxfp8", [1.11, 2.09, 3.10])))
    got = difference(named["mxfp8"], named["plain"])
    assert got is not None
    assert got.mean == pytest.approx(0.1)
    assert got.error == pytest.approx(0.01 / math.sqrt(3))
    assert got.told_apart
    assert str(got) == "+0.1000 +- 0.0058"
    assert difference(by_name(made(("x", [1.0])))["x"], {}) is None


def test_three_seeds_need_more_than_two_standard_errors() -> None:
    """Student's t with two degrees of freedom: 4.30."""
    assert not Difference(0.42, 0.1, 3).told_apart
    assert Difference(0.44, 0.1, 3).told_apart
    assert Difference(-0.44, 0.1, 3).told_apart
    assert not Difference(0.44, math.nan, 1).told_apart


def test_a_table_that_ranks_nothing_says_so() -> None:
    noise = markdown(made(("plain", [1.0, 1.0, 1.0]), ("mxfp8", [1.1, 0.9, 1.05])))
    assert "No row can be told from the baseline" in noise
    assert "not rank" not in noise, "1,000 tokens for 5 parameters are enough"
    one = markdown(made(("plain", [1.0]), ("mxfp8", [1.1])))
    assert "One seed has no standard error" in one
    clear = made(("plain", [1.0, 1.0, 1.0]), ("mxfp8", [1.1, 1.11, 1.12]))
    assert "1 of 1 rows differ" in markdown(clear)
    assert "+0.1100 +- 0.0058 *" in markdown(clear)
    short = markdown([each | {"num_params": 2000} for each in clear])
    assert "**At 0.5 tokens a parameter the table does not rank recipes**" in short


def test_emulated_rows_carry_no_speed() -> None:
    values = (("plain", [1.0, 1.0]), ("mxfp8", [1.2, 1.2]))
    assert "500" not in markdown(made(*values))
    native = markdown(made(*values, path="native"))
    assert native.count("| 500 |") == 2
    mixed = markdown(made(*values) + made(("quartet", [1.0, 1.1]), path="native"))
    (row,) = (line for line in mixed.splitlines() if line.startswith("| mxfp8 "))
    assert row.endswith("| 2 |  |")


def test_what_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no cells"):
        read_cells(tmp_path)
    with pytest.raises(ValueError, match="no cell of 'plain'"):
        markdown(made(("mxfp8", [1.0])))
    for name, size in (("plain", 10), ("mxfp8", 11)):
        other = cell(name, 0, 1.0) | {"vocab_size": size}
        (tmp_path / f"{name}_seed0.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="differ in vocab_size: not one comparison"):
        read_cells(tmp_path)


def test_error_sums_of_known_numbers() -> None:
    """6 and 0.25 in one block: 0.25 rounds to the even code 0."""
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([6.0, 0.25])
    text = "mxfp4 even"
    error, aligned, total = error_tables.error_sums(x, error_tables.quantizer_of(text)[0], None)
    assert (error, aligned, total) == (0.0625, 36.0, 36.0625)


def test_error_tables_of_a_run(base: Path) -> None:
    run_here(
        base,
        "python -m scripts.base_train --device=cpu --depth=1 --max_seq_len=32 --num_iterations=3 "
        "--device_batch_size=2 --total_batch_size=64 --eval_tokens=64 --sample_every=-1",
        f"--data_dir={base / 'text'}",
    )
    command = "python -m experiments.mxfp4.error_tables --device=cpu --batch_size=2"
    output = base / "errors.json"
    run_here(base, command, f"--data_dir={base / 'text'}", f"--output={output}")
    document = json.loads(output.read_text())
    rows = {(r["layers"], r["operand"], r["quantizer"]): r for r in document["rows"]}
    assert len(rows) == 4 * 6 * len(error_tables.QUANTIZERS)
    for layers in ("attn.c_qkv", "mlp.c_fc"):
        assert 0.009 < rows[layers, "W", "mxfp4 even"]["relative_error"] < 0.017
        stochastic = rows[layers, "dy", "mxfp4 rceil stochastic"]
        assert stochastic["alignment"] == pytest.approx(1, abs=0.02)
    assert output.with_suffix(".md").read_text().count("\n## ") == 3


@pytest.mark.parametrize(("folder", "cells"), [("toy_cpu", len(CELLS)), ("d4_cpu", 8)])
def test_the_stored_report_is_of_the_stored_cells(folder: str, cells: int) -> None:
    found = read_cells(RESULTS / folder)
    assert (RESULTS / folder / "report.md").read_text() == markdown(found)
    named = by_name(found)
    assert len(named) == cells
    assert set(named) <= set(CELLS)
    assert all(set(own) == {0, 1, 2} for own in named.values())


def test_the_stored_tables_of_errors_are_of_the_stored_rows() -> None:
    document = json.loads((RESULTS / "errors_d4.json").read_text())
    assert (RESULTS / "errors_d4.md").read_text() == error_tables.markdown(document)


def test_the_readme_shows_what_was_computed() -> None:
    text = README.read_text(encoding="utf-8")
    assert measured.markdown([]) in text
    title = forecast.WHAT[0]
    rows = {name: forecast.ratios(name, forecast.REACHED, title) for name in forecast.SHOWN}
    assert forecast.table(title, rows) in text
    for folder in ("toy_cpu", "d4_cpu"):
        assert report.verdict(by_name(read_cells(RESULTS / folder))) in text
    rows = json.loads((RESULTS / "errors_d4.json").read_text())["rows"]
    place = ("attn.c_proj", "x^T")
    column = {r["quantizer"]: r for r in rows if (r["layers"], r["operand"]) == place}
    names = ("mxfp4 even", "mxfp4 even hadamard", "mxfp4 even hadamard, signs")
    plain, transformed, signed = (f"{1e3 * column[n]['relative_error']:.1f}" for n in names)
    assert f"from {plain} to {transformed} thousandths" in text
    assert f"it is {signed}." in text
