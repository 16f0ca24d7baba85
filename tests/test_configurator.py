"""Settings: defaults, then config files in order, then flags."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from nanochat import configurator
from nanochat.configurator import Configurator, field_comments, load


@dataclass(frozen=True)
class Settings:
    """Pretend to train."""

    run: str = "dummy"  # name of the run
    depth: int = 20  # transformer blocks
    matrix_lr: float = 0.02  # rate of the matrices
    eval_every: int = 250  # steps between validations
    compile: bool = False  # compile the model
    shuffle: bool = True  # shuffle the rows
    steps: int | None = None  # optimizer steps
    packing: Literal["stream", "bestfit"] = "stream"  # how rows are filled
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""  # text to continue


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_without_arguments():
    assert load(Settings, []) == Settings()


def test_files_in_order_then_flags(tmp_path):
    first = write(tmp_path / "first.py", "depth = 4\nmatrix_lr = 1\nrun = 'first'\n")
    second = write(tmp_path / "second.py", "depth = 8\n")
    settings = load(Settings, ["--run=flag", first, second])
    assert settings == Settings(run="flag", depth=8, matrix_lr=1.0)
    assert type(settings.matrix_lr) is float
    assert load(Settings, [second, first]).depth == 4
    assert load(Settings, ["--depth=2", first, second]).depth == 2


@pytest.mark.parametrize("form", [["{}"], ["--config", "{}"], ["--config={}"]])
def test_every_way_to_name_a_file(tmp_path, form):
    path = write(tmp_path / "c=1.py", "depth = 4\n")
    assert load(Settings, [word.format(path) for word in form]).depth == 4


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--matrix_lr=0.5"], {"matrix_lr": 0.5}),
        (["--matrix-lr=0.5"], {"matrix_lr": 0.5}),
        (["--matrix-lr", "0.5"], {"matrix_lr": 0.5}),
        (["--matrix_lr", "1"], {"matrix_lr": 1.0}),
        (["--eval_every=-1"], {"eval_every": -1}),
        (["--eval_every", "-1"], {"eval_every": -1}),
        (["--run=a=b"], {"run": "a=b"}),
        (["--run", "name.py"], {"run": "name.py"}),
        (["--run", "--odd"], {"run": "--odd"}),
        (["--run="], {"run": ""}),
        (["--compile"], {"compile": True}),
        (["--compile", "--depth=3"], {"compile": True, "depth": 3}),
        (["--compile=True"], {"compile": True}),
        (["--compile=1"], {"compile": True}),
        (["--compile", "true"], {"compile": True}),
        (["--compile=False"], {"compile": False}),
        (["--no-shuffle"], {"shuffle": False}),
        (["--no_shuffle"], {"shuffle": False}),
        (["--no-shuffle=False"], {"shuffle": True}),
        (["--shuffle=0"], {"shuffle": False}),
        (["--shuffle=False"], {"shuffle": False}),
        (["--steps=10"], {"steps": 10}),
        (["--steps=None"], {"steps": None}),
        (["--packing", "bestfit"], {"packing": "bestfit"}),
        (["-p", "hello world"], {"prompt": "hello world"}),
        (["-p", "- x.py"], {"prompt": "- x.py"}),
        (["--prompt=hi"], {"prompt": "hi"}),
        (["--", "--depth=3"], {"depth": 3}),
        (["--depth=3", "--depth=4"], {"depth": 4}),
    ],
)
def test_flag_forms(argv, expected):
    assert load(Settings, argv) == dataclasses.replace(Settings(), **expected)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dpeth=3"], "did you mean '--depth'"),
        (["--dpeth", "3"], "did you mean '--depth'"),
        (["--depth=many"], "many"),
        (["--depth=1.5"], "1.5"),
        (["--compile=maybe"], "--compile=maybe: wanted one of true, 1"),
        (["--compile="], "--compile=: wanted"),
        (["--packing=loose"], "loose"),
        (["--depth"], "--depth needs a value"),
        (["--config"], "--config needs a value"),
        (["--no-shufle"], "'--no_shuffle'"),
        (["--no-depth"], "unknown flag '--no-depth'"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        load(Settings, argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_help_shows_flag_type_default_and_comment(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        load(Settings, [write(tmp_path / "c.py", "depth = 13\n"), "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--eval_every", "INT", "transformer blocks", "250", "13", "Pretend to train."):
        assert part in text


def test_config_files_may_compute(tmp_path):
    path = write(
        tmp_path / "computed.py",
        "from __future__ import annotations\n"
        "import math\nfrom pathlib import Path\nfrom os.path import join\n"
        "_half = 4\ndef double(x): return 2 * x\nclass Helper: pass\n"
        "depth = double(_half)\nmatrix_lr = math.sqrt(4)\n",
    )
    assert load(Settings, [path]) == Settings(depth=8, matrix_lr=2.0)


def test_config_files_do_not_share_a_namespace(tmp_path):
    write(tmp_path / "a.py", "depth = 4\n")
    second = write(tmp_path / "b.py", "run = str(depth)\n")
    with pytest.raises(ValueError, match=r"b\.py, line 1: NameError: name 'depth'"):
        load(Settings, [str(tmp_path / "a.py"), second])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("detph = 4", ["unknown setting 'detph'", "did you mean 'depth'"]),
        ("zzz = 4", ["unknown setting 'zzz'", "matrix_lr"]),
        ("depth = 4.0", ["depth = 4.0", "float", "wanted int"]),
        ("depth = True", ["depth = True", "bool", "wanted int"]),
        ("depth = '4'", ["depth = '4'", "str", "wanted int"]),
        ("compile = 1", ["compile = 1", "wanted bool"]),
        ("matrix_lr = True", ["matrix_lr = True", "wanted float"]),
        ("run = None", ["run = None", "wanted str"]),
        ("steps = 'x'", ["steps = 'x'", "int | None"]),
        ("packing = 'loose'", ["packing = 'loose'", "bestfit"]),
    ],
)
def test_bad_config_values(tmp_path, text, parts):
    path = write(tmp_path / "bad.py", text + "\n")
    with pytest.raises(ValueError, match=r"bad\.py") as error:
        load(Settings, [path])
    for part in parts:
        assert part in str(error.value)


def test_optional_and_literal_config_values(tmp_path):
    path = write(tmp_path / "good.py", "steps = 3\npacking = 'bestfit'\n")
    assert load(Settings, [path]) == Settings(steps=3, packing="bestfit")
    assert load(Settings, [write(tmp_path / "none.py", "steps = None\n")]).steps is None


def test_missing_config_file():
    with pytest.raises(FileNotFoundError, match=r"no config file 'absent\.py'"):
        load(Settings, ["absent.py"])


def test_config_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = "configs/dual_gpu/stable_26gb.py"
    assert Configurator(relative).depth == 14
    (tmp_path / "configs/dual_gpu").mkdir(parents=True)
    write(tmp_path / relative, "depth = 2\n")
    assert Configurator(relative).depth == 2, "the working directory comes first"


def test_configurator(tmp_path):
    config = Configurator(write(tmp_path / "c.py", "import os\n_x = 1\ndepth = 4\nrun = 'r'\n"))
    assert (config.depth, config.run) == (4, "r")
    assert config.get("depth") == 4
    assert config.get("absent", 7) == 7
    assert "depth" in config
    assert "os" not in config
    assert list(config) == config.keys() == ["depth", "run"]
    assert config.as_dict() == {"depth": 4, "run": "r"}
    config.as_dict()["depth"] = 5
    assert config.depth == 4
    with pytest.raises(AttributeError, match="did you mean 'depth'"):
        _ = config.detph
    with pytest.raises(FileNotFoundError, match="absent"):
        Configurator("absent.py")


def test_field_comments():
    @dataclass(frozen=True)
    class Base:
        """x."""

        a: int = 1  # first # of two
        b: tuple[int, ...] = (
            1,  # not this one
        )  # second

    @dataclass(frozen=True)
    class Child(Base):
        c: str = "#"
        # above the field, not after it
        d: str = "# no"  # fourth

    assert field_comments(Child) == {"a": "first # of two", "b": "second", "c": "", "d": "fourth"}


def test_command_line_of_a_process(tmp_path):
    script = write(
        tmp_path / "script.py",
        "from dataclasses import dataclass\nfrom nanochat.configurator import load\n"
        "@dataclass(frozen=True)\nclass Settings:\n    depth: int = 20  # blocks\n"
        "print(load(Settings).depth)\n",
    )
    environment = {**os.environ, "PYTHONPATH": str(configurator.REPOSITORY_ROOT)}
    run = [sys.executable, script, "--depth", "3"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
