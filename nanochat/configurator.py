"""Settings of a script: the defaults of a dataclass, then config files in order, then flags.

    python -m scripts.base_train configs/dual_gpu/stable_26gb.py --depth=12
    python -m scripts.base_train --config configs/dual_gpu/stable_26gb.py --depth 12

A script declares one flat frozen dataclass: the comment at the end of a field's line is its help
text, its annotation says what is allowed (nanochat/settings.py). A config file is ordinary Python,
run in its own namespace: its public values are settings, while names that begin with an underscore
and whatever it imports or defines (modules, functions, classes) are not.
"""

import __future__

import ast
import dataclasses
import inspect
import io
import runpy
import sys
import textwrap
import tokenize
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from nanochat.command import usage_error
from nanochat.settings import near_miss, number_of, problem, rule_of

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
SWITCH_WORDS = {"true": True, "1": True, "false": False, "0": False}
# what a config file, which is any Python, may come to grief on
CONFIG_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    SyntaxError,
    TypeError,
    ValueError,
)

SettingsT = TypeVar("SettingsT")


def load(settings_class: type[SettingsT], argv: Sequence[str] | None = None) -> SettingsT:
    """Read the settings of a script from its command line.

    Args:
        settings_class: a frozen dataclass whose fields are bool, int, float, str, Literal, or one
            of these or None, all with defaults. OTHER_CONFIGS = True in its body lets a config file
            set what another script takes: names that are no fields are passed over.
        argv: the arguments without the program's name; None takes those of this process.

    Raises:
        FileNotFoundError: a config file is neither under the working directory nor in the checkout.
        ValueError: a config file sets an unknown name, or a value of the wrong type or range.
        SystemExit: status 2 for a bad flag, with the nearest real one; 0 after --help.
    """
    hints = typing.get_type_hints(settings_class, include_extras=True)
    assert "config" not in hints, "--config is the flag that names a config file"
    arguments = split_arguments(settings_class, sys.argv[1:] if argv is None else argv)
    values: dict[str, Any] = {}
    for path in arguments.paths:
        resolved = find_config(path)
        for name, value in read_config(resolved).items():
            if name not in hints and getattr(settings_class, "OTHER_CONFIGS", False):
                continue
            if name not in hints:
                raise ValueError(f"{resolved}: unknown setting {name!r}{near_miss(name, hints)}")
            values[name] = check_value(resolved, name, value, hints[name])
    defaults = values
    values = {**values, **arguments.values}
    if arguments.help:
        print_help(settings_class, settings_class(**defaults))
    return settings_class(**values)


def print_help(settings_class: type, defaults: object) -> typing.NoReturn:
    """Print every flag with its meaning, what it may be and its default; leave with status 0."""
    comments = field_comments(settings_class)
    hints = typing.get_type_hints(settings_class, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(settings_class):
        hint = hints[field.name]
        rule = rule_of(hint)
        text = comments[field.name] + (f" ({rule.allowed})" if rule else "")
        argument = tyro.conf.arg(aliases=aliases(hint), help=text)
        default = dataclasses.field(default=getattr(defaults, field.name))
        fields.append((field.name, Annotated[plain(hint), argument], default))
    tyro.cli(
        dataclasses.make_dataclass(settings_class.__name__, fields),
        args=["--help"],
        description=(settings_class.__doc__ or "") + "\n\nConfig files (FILE.py or --config FILE) "
        "replace the defaults in the order given; flags replace both.",
        use_underscores=True,
    )
    raise AssertionError("--help exits")


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


@dataclasses.dataclass
class Arguments:
    """A command line, taken apart: config files in order, values by field."""

    paths: list[str] = dataclasses.field(default_factory=list)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    help: bool = False


def split_arguments(settings_class: type, argv: Sequence[str]) -> Arguments:
    """Part a command line into config files and checked values.

    A flag takes the next word whatever it looks like, so that no value is mistaken for a config
    file or for another flag: `--eval_every -1` is `--eval_every=-1`; `--compile` takes one only if
    it is true or false. Leaves with status 2 for whatever is no flag, or not what a flag may be.
    """
    hints = {**typing.get_type_hints(settings_class, include_extras=True), "config": str}
    names = flag_names(settings_class)
    found = Arguments()
    words = [word for word in argv if word != "--"]  # `torchrun -m scripts.x -- --depth=12`
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        if not word.startswith("-"):
            if not word.endswith(".py"):
                usage_error(f"{word!r} is neither a flag (--name=value) nor a config file (.py)")
            found.paths.append(word)
        elif flag in ("-h", "--help"):
            found.help = True
        elif flag not in names:
            usage_error(f"unknown flag {word!r}{near_miss(flag, names)}")
        elif hints[names[flag]] is bool:
            if not equals and words and words[0].lower() in SWITCH_WORDS:
                value = words.pop(0)
            found.values[names[flag]] = switch(flag, value if equals else value or "true")
        else:
            if not equals and not words:
                usage_error(f"{flag} needs a value")
            value = value if equals else words.pop(0)
            if names[flag] == "config":
                found.paths.append(value)
            else:
                found.values[names[flag]] = convert(flag, value, hints[names[flag]])
    return found


def flag_names(settings_class: type) -> dict[str, str]:
    """Every flag, aliases and `--no_` forms included, with the field it sets."""
    names = {"--config": "config"}
    for name, hint in typing.get_type_hints(settings_class, include_extras=True).items():
        names[f"--{name}"] = name
        if hint is bool:
            names[f"--no_{name}"] = name
        names.update(dict.fromkeys(aliases(hint), name))
    return names


def aliases(hint: Any) -> tuple[str, ...]:
    """Other flags of a field: Annotated[int, tyro.conf.arg(aliases=["-n"])]."""
    extras = getattr(hint, "__metadata__", ())
    return tuple(a for extra in extras for a in getattr(extra, "aliases", None) or ())


def switch(flag: str, value: str) -> bool:
    """What a flag of a bool means with `value`, one of SWITCH_WORDS; --no_ turns it round."""
    if value.lower() not in SWITCH_WORDS:
        usage_error(f"{flag}={value}: wanted one of {', '.join(SWITCH_WORDS)}")
    return SWITCH_WORDS[value.lower()] != flag.startswith("--no_")


def convert(flag: str, text: str, hint: Any) -> Any:
    """The value a flag's text stands for; leaves with status 2 if it may not be that."""
    given, text = text, str(number_of(text, hint))
    for option in options_of(hint):
        try:
            if option is type(None):
                value = {"none": None}[text.lower()]
            elif typing.get_origin(option) is typing.Literal:
                value = {str(choice): choice for choice in typing.get_args(option)}[text]
            else:
                value = option(text)
        except (ValueError, KeyError):
            continue
        wrong = problem(value, hint)
        if wrong:
            usage_error(f"{flag}={given} {wrong}")
        return value
    return usage_error(f"{flag}={given}: wanted {wanted(hint)}")


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
    """Run a config file in a namespace of its own and return its public values.

    Raises  ValueError naming the file and the error if it does not run.
    """
    try:
        values = runpy.run_path(str(path))
    except CONFIG_ERRORS as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(path)]  # fmt: skip
        line = error.lineno if isinstance(error, SyntaxError) else [*lines, None][0]
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType | __future__._Feature)
        and not callable(value)
    }


def check_value(path: Path, name: str, value: Any, hint: Any) -> Any:
    """`value` as the field `name` takes it: ints pass for floats, nothing else is converted."""
    value = number_of(value, hint)
    for option in options_of(hint):
        if option is float and type(value) is int:
            value = float(value)
        if typing.get_origin(option) is typing.Literal:
            fits = value in typing.get_args(option)
        else:
            fits = type(value) is option
        if fits:
            wrong = problem(value, hint)
            if wrong:
                raise ValueError(f"{path}: {name} = {value!r} {wrong}")
            return value
    kind = type(value).__name__
    raise ValueError(f"{path}: {name} = {value!r} is a {kind}, wanted {wanted(hint)}")


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types an annotation stands for: one, or the members of a union."""
    kind = plain(hint)
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def plain(hint: Any) -> Any:
    """The type inside an annotation."""
    return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def kind_name(hint: Any) -> str:
    """How the type inside an annotation is written."""
    kind = plain(hint)
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def wanted(hint: Any) -> str:
    """The type and what it may be: "int, at least 1"."""
    rule = rule_of(hint)
    return f"{kind_name(hint)}, {rule.allowed}" if rule else kind_name(hint)
