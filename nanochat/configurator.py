"""Settings of a script: the defaults of a dataclass, then config files in order, then flags.

    python -m scripts.base_train configs/dual_gpu/stable_26gb.py --depth=12
    python -m scripts.base_train --config configs/dual_gpu/stable_26gb.py --depth 12

A stage declares one flat frozen dataclass; the comment behind each field is its help text. A config
file is ordinary Python, run in its own namespace: its public values are settings, while names that
begin with an underscore and whatever it imports or defines (modules, functions, classes) are not.
"""

import __future__

import ast
import dataclasses
import difflib
import inspect
import io
import runpy
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
SWITCH_WORDS = {"true": True, "1": True, "false": False, "0": False}

SettingsT = TypeVar("SettingsT")


def load(settings_class: type[SettingsT], argv: Sequence[str] | None = None) -> SettingsT:
    """Read the settings of a script from its command line.

    Args:
        settings_class: a frozen dataclass whose fields are bool, int, float, str, Literal, or one
            of these or None, all with defaults.
        argv: the arguments without the program's name; None takes those of this process.

    Raises:
        FileNotFoundError: a config file is neither under the working directory nor in the checkout.
        ValueError: a config file sets an unknown name or a value of the wrong type.
        SystemExit: status 2 for a bad flag, with the nearest real one; 0 after --help.
    """
    kinds = typing.get_type_hints(settings_class)
    assert "config" not in kinds, "--config is the flag that names a config file"
    paths, flags = split_arguments(settings_class, sys.argv[1:] if argv is None else argv)
    values: dict[str, Any] = {}
    for path in paths:
        resolved = find_config(path)
        for name, value in read_config(resolved).items():
            if name not in kinds:
                raise ValueError(f"{resolved}: unknown setting {name!r}{near_miss(name, kinds)}")
            values[name] = check_value(resolved, name, value, kinds[name])
    return tyro.cli(
        settings_class,
        args=flags,
        default=settings_class(**values),
        description=(settings_class.__doc__ or "") + "\n\nConfig files (FILE.py or --config FILE) "
        "replace the defaults in the order given; flags replace both.",
        use_underscores=True,
    )


class Configurator:
    """The values of one config file as attributes: `Configurator("configs/x.py").depth`.

    Raises FileNotFoundError for a missing file, AttributeError for a name the file does not set.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = find_config(path)
        self._values = read_config(self._path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also keeps copy and pickle from recursing before __init__
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(
                f"{self._path} does not set {name!r}{near_miss(name, self._values)}"
            )
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __repr__(self) -> str:
        return f"Configurator({str(self._path)!r})"

    def get(self, name: str, default: Any = None) -> Any:
        """The value of `name`, or `default` where the file does not set it."""
        return self._values.get(name, default)

    def keys(self) -> list[str]:
        """The names the file sets, in its order."""
        return list(self._values)

    def as_dict(self) -> dict[str, Any]:
        """A copy of all names and values."""
        return dict(self._values)


def field_comments(settings_class: type) -> dict[str, str]:
    """The comment at the end of each field's line, or "" where it has none, in field order."""
    comments: dict[str, str] = {}
    for owner in reversed(settings_class.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        source = textwrap.dedent(inspect.getsource(owner))
        by_line = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        class_node = ast.parse(source).body[0]
        assert isinstance(class_node, ast.ClassDef)
        for node in class_node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                assert node.end_lineno is not None
                comments[node.target.id] = by_line.get(node.end_lineno, "")
    return {field.name: comments[field.name] for field in dataclasses.fields(settings_class)}


def split_arguments(settings_class: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line into config files and flags.

    Every flag comes back as one word, so that no value is taken for a config file or for another
    flag: `--eval_every -1` is `--eval_every=-1`, `--compile=1` is `--compile`.
    """
    kinds = {**typing.get_type_hints(settings_class), "config": str}
    names = flag_names(settings_class)
    paths: list[str] = []
    flags: list[str] = []
    words = [word for word in argv if word != "--"]  # `torchrun -m scripts.x -- --depth=12`
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        if not word.startswith("-"):
            (paths if word.endswith(".py") else flags).append(word)
        elif flag in ("-h", "--help"):
            flags.append("--help")
        elif flag not in names:
            usage_error(f"unknown flag {word!r}{near_miss(flag, names)}")
        elif kinds[names[flag]] is bool:
            if not equals and words and words[0].lower() in SWITCH_WORDS:
                value = words.pop(0)
            flags.append(switch(names[flag], flag, value if equals else value or "true"))
        else:
            if not equals and not words:
                usage_error(f"{flag} needs a value")
            value = value if equals else words.pop(0)
            if names[flag] == "config":
                paths.append(value)
            else:
                flags.append(f"--{names[flag]}={value}")
    return paths, flags


def flag_names(settings_class: type) -> dict[str, str]:
    """Every flag, aliases and `--no_` forms included, with the field it sets."""
    names = {"--config": "config"}
    for name, hint in typing.get_type_hints(settings_class, include_extras=True).items():
        names[f"--{name}"] = name
        if hint is bool:
            names[f"--no_{name}"] = name
        for extra in getattr(hint, "__metadata__", ()):
            names.update(dict.fromkeys(getattr(extra, "aliases", None) or (), name))
    return names


def switch(name: str, flag: str, value: str) -> str:
    """The valueless form of `flag` set to `value`, one of SWITCH_WORDS."""
    if value.lower() not in SWITCH_WORDS:
        usage_error(f"{flag}={value}: wanted one of {', '.join(SWITCH_WORDS)}")
    is_on = SWITCH_WORDS[value.lower()] != flag.startswith("--no_")
    return f"--{name}" if is_on else f"--no_{name}"


def usage_error(message: str) -> typing.NoReturn:
    print(f"error: {message} (see --help)", file=sys.stderr)
    sys.exit(2)


def find_config(path: str | Path) -> Path:
    """The config file under the working directory, else in the checkout of this package."""
    wanted = Path(path).expanduser()
    for candidate in (Path.cwd() / wanted, REPOSITORY_ROOT / wanted):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no config file {str(path)!r}: looked in {Path.cwd()} and {REPOSITORY_ROOT}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Run a config file in a namespace of its own and return its public values."""
    return {
        name: value
        for name, value in runpy.run_path(str(path)).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType | __future__._Feature)
        and not callable(value)
    }


def check_value(path: Path, name: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`: ints pass for floats, nothing else is converted."""
    for option in typing.get_args(kind) if is_union(kind) else (kind,):
        if option is float and type(value) is int:
            return float(value)
        if typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif type(value) is option:
            return value
    wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise ValueError(f"{path}: {name} = {value!r} is a {type(value).__name__}, wanted {wanted}")


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def near_miss(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
