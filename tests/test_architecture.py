"""Which module may import which, and how long a file may be.

The rules are read from the docstrings of the rooms (dev/house.py); here stands only how they are
checked. Each check lists every offender.
"""

import ast
from pathlib import Path

import pytest

from dev import house

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanochat"
ROOMS = house.rooms(PACKAGE)
FLOORS = [[f"nanochat.{name}" for name in floor] for floor in house.floors(PACKAGE)]
FLOOR = {name: i for i, names in enumerate([*FLOORS, *house.ABOVE]) for name in names}
PACKAGES = ("nanochat", *(name for names in house.ABOVE for name in names))
ENTRY_POINTS = ("scripts", "bench", "experiments", "dev")

# Raising a limit is a change that a reviewer sees; the fix is usually a second idea in the file.
LINE_LIMITS = {
    "nanochat/kernels": 300,
    "nanochat": 350,
    "scripts": 290,
    "tasks": 200,
    "bench": 260,  # a subject whole: contenders with their check, a report with its tables
    "experiments": 250,
    "dev": 200,
}


def sources(*packages: str) -> list[str]:
    """Paths of what is not a test."""
    return [
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        if "tests" not in path.relative_to(ROOT).parts
    ]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """The unit that has a floor: nanochat.gpt, nanochat.kernels, tasks, scripts, ..."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "nanochat" else parts[0]


def imports(source: str) -> tuple[set[str], bool]:
    """Modules of ours that the source imports anywhere, and whether one import is relative."""
    found: set[str] = set()
    relative = False
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative |= node.level > 0
            base = node.module or ""
            found.update(f"{base}.{alias.name}" for alias in node.names)
    ours = {name for name in found if name.split(".")[0] in PACKAGES}
    return ours, relative


def violations(path: str, source: str) -> list[str]:
    module = module_name(path)
    room = room_of(module)
    imported, relative = imports(source)
    found = [f"{path} imports relatively"] if relative else []
    declared = ROOMS[room.removeprefix("nanochat.")] if room in map_of_rooms() else None
    for other in sorted(imported):
        target = room_of(other)
        if target not in FLOOR:  # nanochat itself, or `from nanochat import __version__`
            continue
        if FLOOR[target] > FLOOR.get(room, 0):
            found.append(f"{path} imports {other}, which is on a floor above")
        allowed = declared.may_import if declared else None
        if allowed is not None and target not in (room, *(f"nanochat.{name}" for name in allowed)):
            found.append(f"{path} imports {other}, which nanochat/{room[9:]} does not declare")
        # a bench and an experiment are folders of parts; a script is one file
        own_part = target == room != "scripts" or other.startswith(module + ".")
        if room in ENTRY_POINTS and target in ENTRY_POINTS and not own_part:
            found.append(f"{path} imports {other}: entry points do not import each other")
    return found


def map_of_rooms() -> set[str]:
    return {f"nanochat.{name}" for name in ROOMS}


def test_imports_go_down():
    offenders = [
        offence
        for path in sources(*PACKAGES[:-1])
        for offence in violations(path, (ROOT / path).read_text())
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(
    ("path", "source", "part"),
    [
        ("nanochat/gpt.py", "from .muon import Muon", "relatively"),
        ("nanochat/gpt.py", "from nanochat.train.step import train_step", "floor above"),
        ("nanochat/gpt.py", "from nanochat import train", "floor above"),
        ("nanochat/gpt.py", "def f():\n    import nanochat.infer.engine", "floor above"),
        ("nanochat/optim/x.py", "from nanochat import tracking", "does not declare"),
        ("nanochat/infer/engine.py", "from tasks.common import Task", "floor above"),
        ("nanochat/report.py", "from experiments.mxfp4 import train", "floor above"),
        ("nanochat/kernels/x.py", "from nanochat.common import print0", "does not declare"),
        ("scripts/base_train.py", "from scripts import base_loss", "entry points"),
        ("scripts/base_train.py", "import experiments.mxfp4.linear", "entry points"),
        ("bench/test_gpt.py", "from scripts.base_train import Settings", "entry points"),
        ("experiments/mxfp4/train.py", "from scripts import base_train", "entry points"),
        ("bench/test_gpt.py", "from experiments.mxfp4 import formats", "entry points"),
    ],
)
def test_the_rule_sees_a_wrong_import(path, source, part):
    assert part in " ".join(violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nanochat/gpt.py", "import torch\nfrom nanochat.kernels.rms_norm import rms_norm"),
        ("nanochat/gpt.py", "from nanochat.optim import muon"),
        ("nanochat/kernels/x.py", "from nanochat.kernels.registry import Op"),
        ("scripts/base_train.py", "from nanochat import __version__, train"),
        ("experiments/mxfp4/train.py", "from experiments.mxfp4.linear import Linear"),
    ],
)
def test_the_rule_allows_the_rest(path, source):
    assert violations(path, source) == []


def test_rooms_declare_what_is_inside():
    """The docstrings name the files that are there, on floors that exist."""
    offenders = []
    door = house.read_room(PACKAGE / "__init__.py")
    for name, room in {"": door, **ROOMS}.items():
        folder = PACKAGE / name
        here = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        offenders += [f"nanochat/{name} does not list {x}" for x in sorted(here - {*room.modules})]
        offenders += [f"nanochat/{name} has no {x}" for x in sorted({*room.modules} - here)]
        if name and room.may_import is None:
            offenders.append(f"nanochat/{name} does not say what it may import")
    placed = {name for floor in FLOORS for name in floor}
    units = {f"nanochat.{name}" for name in [*ROOMS, *door.modules]}
    offenders += [f"{name} has no floor" for name in sorted(units - placed)]
    offenders += [f"{name} has a floor and no file" for name in sorted(placed - units)]
    assert not offenders, "\n".join(offenders)


def test_rooms_declare_no_import_they_do_not_use():
    """So that the drawing shows arrows that exist."""
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for path in sources("nanochat"):
        room = room_of(module_name(path)).removeprefix("nanochat.")
        if room in used:
            found, _ = imports((ROOT / path).read_text())
            used[room] |= {room_of(other).removeprefix("nanochat.") for other in found} - {room}
    offenders = [
        f"nanochat/{name} declares {other} and does not import it"
        for name, room in ROOMS.items()
        for other in sorted((room.may_import or frozenset()) - used[name])
    ]
    assert not offenders, "\n".join(offenders)


def test_files_are_read_in_one_sitting():
    offenders = []
    for path in sources(*PACKAGES[:-1]):
        limit = next(n for folder, n in LINE_LIMITS.items() if path.startswith(folder + "/"))
        lines = len((ROOT / path).read_text().splitlines())
        if lines > limit:
            offenders.append(f"{path} has {lines} lines, the limit is {limit}")
    assert not offenders, "\n".join(offenders)
