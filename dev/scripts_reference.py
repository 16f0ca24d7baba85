"""docs/scripts_reference.md from the settings of every script.

python -m dev.scripts_reference            print it
python -m dev.scripts_reference --write    write the file
"""

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

from nanochat.configurator import field_comments
from nanochat.settings import rule_of

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("python ", "torchrun ")  # how a line of a docstring that is a command begins
OUTPUT = ROOT / "docs" / "scripts_reference.md"
HEADER = """# Scripts reference

Written by `python -m dev.scripts_reference --write` from the settings in the scripts themselves; a
test compares the two. Every script reads its settings alike: defaults, then config files in the
order given (`FILE.py`, `--config FILE` or `--config=FILE`), then flags. `--key=value` and
`--key value` are the same, so are `-` and `_` in names; a switch takes `--flag`, `--no_flag` or
`--flag=False`. `--help` prints this page's part.
"""


def stage_modules() -> list[ModuleType]:
    """Every module in scripts/, in alphabetical order."""
    names = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem[0] != "_")
    return [importlib.import_module(f"scripts.{name}") for name in names]


def uncommented_fields(module: ModuleType) -> list[str]:
    """Fields of a script's Settings without a comment at the end of the line, hence no help."""
    return [name for name, comment in field_comments(module.Settings).items() if not comment]


def section(module: ModuleType) -> str:
    """One script: its docstring, then a table of its settings."""
    lines = (module.__doc__ or "").strip().splitlines()
    commands = [line.strip() for line in lines if line.strip().startswith(COMMANDS)]
    prose = [line for line in lines if not line.strip().startswith(COMMANDS)]
    name = module.__name__.removeprefix("scripts.")
    kinds = get_type_hints(module.Settings)
    hints = get_type_hints(module.Settings, include_extras=True)
    comments = field_comments(module.Settings)
    rows = [
        f"| `--{field.name}` | {kind_name(kinds[field.name])} | `{field.default!r}` "
        f"| {allowed(hints[field.name])} | {comments[field.name]} |"
        for field in dataclasses.fields(module.Settings)
    ]
    return "\n".join(
        [
            f"## {name}\n",
            re.sub(r"\n{3,}", "\n\n", "\n".join(prose).strip()) + "\n",
            "```bash",
            *commands,
            "```\n",
            "| flag | type | default | allowed | meaning |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def kind_name(kind: object) -> str:
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return name.replace("|", "\\|")


def allowed(hint: object) -> str:
    """The range or the choices of a setting; nothing where any value is."""
    rule = rule_of(hint)
    return rule.allowed if rule else ""


def reference() -> str:
    """The whole page."""
    return "\n".join([HEADER, *(section(module) + "\n" for module in stage_modules())])


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        OUTPUT.write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")
