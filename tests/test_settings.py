"""What a setting may be, and how a command ends that was given something else."""

import importlib
import math
import os
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from dev import scripts_reference
from nanochat import command, dataset
from nanochat.configurator import load
from nanochat.settings import (
    Choices,
    Count,
    CountOrMinusOne,
    Finite,
    NonNegative,
    Positive,
    PositiveOrMinusOne,
    Range,
    Share,
    problem,
    without_rule,
)

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["stream", "bestfit"]


@dataclass(frozen=True)
class Settings:
    """Pretend."""

    depth: Count = 20  # blocks
    steps: CountOrMinusOne = -1  # optimizer steps; -1 derives them
    rate: NonNegative = 0.1  # of learning
    ratio: Share = 0.2  # of the run
    flops: PositiveOrMinusOne = -1.0  # of the run
    weight: Finite = 1.0  # of the reward
    limit: Annotated[int | None, Range(1)] = None  # or none
    packing: Annotated[str, Choices(WORDS)] = "stream"  # of rows


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (Count, [1, 10**9], [0, -1, -7]),
        (CountOrMinusOne, [1, -1], [0, -2]),
        (NonNegative, [0.0, 5.0], [-1e-9, math.inf, math.nan]),
        (Positive, [1e-9], [0.0, -1.0, math.inf]),
        (PositiveOrMinusOne, [0.5, -1.0], [0.0, -0.5, math.nan]),
        (Share, [0.0, 0.5, 1.0], [-0.1, 1.1, math.nan]),
        (Finite, [-3.0, 0.0], [math.inf, -math.inf, math.nan]),
        (Annotated[int, Range(0, 65_535)], [0, 65_535], [-1, 65_536]),
        (Annotated[float, Range(0, 1, above=True)], [0.1, 1.0], [0.0, 1.1]),
    ],
)
def test_ranges(rule, good, bad):
    assert [value for value in good if problem(value, rule)] == []
    assert [value for value in bad if not problem(value, rule)] == []


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("depth", "0", "must be at least 1"),
        ("steps", "0", "must be at least 1, or -1"),
        ("steps", "-7", "must be at least 1, or -1"),
        ("rate", "-1.0", "must be at least 0"),
        ("rate", "math.inf", "must be finite and at least 0"),
        ("rate", "math.nan", "must be finite and at least 0"),
        ("ratio", "2.0", "must be from 0 to 1"),
        ("flops", "0.0", "must be above 0, or -1"),
        ("weight", "math.nan", "must be finite"),
        ("limit", "0", "must be at least 1"),
        ("packing", "'bestfi'", "must be stream or bestfit; did you mean 'bestfit'?"),
    ],
)
def test_flags_and_config_files_are_held_to_the_same_rule(tmp_path, capsys, name, value, part):
    (tmp_path / "c.py").write_text(f"import math\n{name} = {value}\n")
    with pytest.raises(ValueError, match=r"c\.py") as error:
        load(Settings, [str(tmp_path / "c.py")])
    assert part in str(error.value)
    word = value.removeprefix("math.").strip("'")
    with pytest.raises(SystemExit) as stop:
        load(Settings, [f"--{name}={word}"])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line == f"error: --{name}={word} {part} (see --help)\n"


def test_help_says_what_is_allowed(capsys):
    with pytest.raises(SystemExit) as stop:
        load(Settings, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("blocks (at least 1)", "(at least 1, or -1)", "(stream or bestfit)"):
        assert part in text


def test_a_table_that_grows_offers_what_was_added(capsys):
    table = ["one"]

    @dataclass(frozen=True)
    class Growing:
        word: Annotated[str, Choices(lambda: table)] = "one"  # of the table

    with pytest.raises(SystemExit):
        load(Growing, ["--word=two"])
    table.append("two")
    assert load(Growing, ["--word=two"]).word == "two"


MODULES = [*scripts_reference.stage_modules(), dataset]


def test_every_numeric_setting_has_a_range():
    offenders = {m.__name__: without_rule(m.Settings) for m in MODULES}
    assert {name: fields for name, fields in offenders.items() if fields} == {}


def test_a_number_without_a_range_is_seen():
    @dataclass(frozen=True)
    class Loose:
        depth: int = 1
        rate: float | None = None
        name: str = ""
        flag: bool = False
        count: Count = 1

    assert without_rule(Loose) == ["depth", "rate"]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_defaults_are_allowed(module):
    """A config file is checked, so every default given by one must pass."""
    defaults = module.Settings()
    hints = typing.get_type_hints(module.Settings, include_extras=True)
    wrong = {name: problem(getattr(defaults, name), hint) for name, hint in hints.items()}
    assert {name: text for name, text in wrong.items() if text} == {}


def raising(error: Exception):
    def main() -> None:
        raise error

    return main


def test_a_mistake_of_the_user_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        command.run(raising(ValueError("tag 'a/b' is\n   wrong")))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: tag 'a/b' is wrong\n"
    with pytest.raises(SystemExit) as stop:
        command.run(lambda: Path("/nowhere/at/all").read_text())
    assert stop.value.code == 2
    assert "/nowhere/at/all" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault",
    [
        lambda: int("x"),
        lambda: {}["absent"],
        lambda: importlib.import_module("json").loads("{"),
        lambda: [1].index(2),
        raising(TypeError("ours")),
        raising(AssertionError("ours")),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(fault):
    with pytest.raises((ValueError, LookupError, TypeError, AssertionError)):
        command.run(fault)


def test_the_first_rank_speaks_for_all(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    monkeypatch.setattr(command.signal, "signal", lambda *what: None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        command.run(raising(ValueError("a disk of its own is full")))
    assert waited == [command.OTHER_RANKS_WAIT]
    assert capsys.readouterr().err == "error: rank 1: a disk of its own is full\n"


SCRIPTS = [
    ("nanochat.dataset", "--num_files=0"),
    ("nanochat.report", "generat"),
    ("scripts.base_loss", "--device_batch_size=0"),
    ("scripts.base_train", "--num_iterations=-7"),
    ("scripts.chat_rl", "--num_samples=0"),
]


@pytest.mark.parametrize(("module", "argument"), SCRIPTS)
def test_commands_end_with_one_line_and_2(tmp_path, module, argument):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", module, argument]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_every_command_ends_like_that():
    """A script without command.run shows a traceback for what its user did."""
    paths = [*sorted((ROOT / "scripts").glob("*.py"))]
    paths += [ROOT / "nanochat" / name for name in ("dataset.py", "report.py")]
    silent = [
        p.name
        for p in paths
        if p.name != "__init__.py" and "command.run(main)" not in p.read_text()
    ]
    assert silent == []
