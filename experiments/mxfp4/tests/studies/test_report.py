"""What a comparison's report says, and what it does not."""

import json
import math
from pathlib import Path

import pytest

from experiments.mxfp4.studies import report
from experiments.mxfp4.studies.report import Difference, by_name, difference, markdown, read_cells


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
    assert got.significant
    assert str(got) == "+0.1000 +- 0.0058"
    assert difference(by_name(made(("x", [1.0])))["x"], {}) is None


def test_three_seeds_need_more_than_two_standard_errors() -> None:
    """Student's t with two degrees of freedom: 4.30."""
    assert not Difference(0.42, 0.1, 3).significant
    assert Difference(0.44, 0.1, 3).significant
    assert Difference(-0.44, 0.1, 3).significant
    assert not Difference(0.44, math.nan, 1).significant


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
