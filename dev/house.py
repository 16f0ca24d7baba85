"""The rooms of nanochat/ and of each experiment, as their docstrings declare them.

    python -m dev.house            prints the tables
    python -m dev.house --write    puts them into docs/project_structure.md, and those of an
                                   experiment into its README.md

A room's `__init__.py` lists its modules in reading order, one indented `name   what it is` each,
and ends with `May import: a, b.` The package's own docstring lists the files at the door the same
way and then the floors, one indented line of names each. Nothing is listed a second time elsewhere.
"""

import ast
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dev.generated import ROOT, Part, main
from nanochat.report import table

PACKAGE = ROOT / "nanochat"
# what stands on the rooms, from the ground; these packages hold entry points or what they share
ABOVE = (("tasks",), ("scripts", "bench", "experiments", "dev"), ("tests",))


@dataclass(frozen=True)
class Room:
    """One `__init__.py` read.

    subject     the first line of the docstring
    modules     name -> description, in reading order
    may_import  rooms and door files, or None where the docstring does not say
    """

    subject: str
    modules: dict[str, str]
    may_import: frozenset[str] | None


def read_room(init: Path) -> Room:
    """Parse the docstring of a room's `__init__.py`. Raises ValueError if it has none."""
    doc = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
    if doc is None:
        raise ValueError(f"{init} has no docstring; say what is inside and what it may import")
    lines = re.findall(r"^ {4}(\w+) {2,}(\S.*)$", doc, flags=re.M)
    allowed = re.search(r"^May import: ([\w, \n]+)\.", doc, flags=re.M)
    may_import = None
    if allowed:
        may_import = frozenset(re.findall(r"\w+", allowed[1])) - {"nothing"}
    return Room(doc.splitlines()[0], dict(lines), may_import)


def rooms(package: Path) -> dict[str, Room]:
    """Every room of a package by name, in alphabetical order."""
    return {init.parent.name: read_room(init) for init in sorted(package.glob("*/__init__.py"))}


def floors(package: Path) -> list[list[str]]:
    """Names of rooms and door files, floor by floor from the ground."""
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    _, _, below = doc.partition("Floors, from the ground")
    return [line.split() for line in re.findall(r"^ {4}(\w.*)$", below, flags=re.M)]


def experiments() -> dict[str, Path]:
    """Every experiment that has rooms: the name it is imported by -> its folder."""
    folders = (init.parent for init in sorted(ROOT.glob("experiments/*/__init__.py")))
    return {f"experiments.{folder.name}": folder for folder in folders if floors(folder)}


def tables(package: Path = PACKAGE) -> str:
    """Floors, and each room with its modules, in Markdown."""
    where = package.relative_to(ROOT).as_posix()
    door, inside = read_room(package / "__init__.py"), rooms(package)
    above = ABOVE if package == PACKAGE else ()
    folders = {*inside, *(name for names in above for name in names)}
    floor_rows = [
        (number, ", ".join(f"`{name}/`" if name in folders else f"`{name}`" for name in names))
        for number, names in enumerate([*floors(package), *above])
    ]
    door_rows = [(f"`{where}/{name}.py`", what) for name, what in door.modules.items()]
    parts = [
        table(("floor", "rooms and door files"), floor_rows),
        "### At the door",
        table(("file", "what it is"), door_rows),
    ]
    for name in (name for floor in floors(package) for name in floor if name in inside):
        room = inside[name]
        allowed = ", ".join(f"`{other}`" for other in sorted(room.may_import or ())) or "nothing"
        parts += [f"### `{where}/{name}/`", f"{room.subject} May import: {allowed}."]
        modules = [(f"`{module}`", what) for module, what in room.modules.items()]
        parts.append(table(("module", "what it is"), modules))
    return "\n\n".join(parts)


PARTS = [
    Part("dev.house", ROOT / "docs" / "project_structure.md", tables),
    *(
        Part("dev.house", folder / "README.md", partial(tables, folder))
        for folder in experiments().values()
    ),
]

if __name__ == "__main__":
    main(PARTS)
