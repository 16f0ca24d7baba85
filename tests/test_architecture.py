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
EXPERIMENTS = house.experiments()
HOUSES = {"nanochat": PACKAGE, **EXPERIMENTS}  # packages with rooms, by the name in an import
ROOMS = {
    f"{house_name}.{name}": room
    for house_name, folder in HOUSES.items()
    for name, room in house.rooms(folder).items()
}
FLOORS = [[f"nanochat.{name}" for name in floor] for floor in house.floors(PACKAGE)]
# (floor, 0); rooms of an experiment are on the floor of experiments, one above the other
FLOOR = {name: (i, 0) for i, names in enumerate([*FLOORS, *house.ABOVE]) for name in names}
FLOOR |= {
    f"{experiment}.{name}": (FLOOR["experiments"][0], i)
    for experiment, folder in EXPERIMENTS.items()
    for i, names in enumerate(house.floors(folder))
    for name in names
}
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


def house_of(module: str) -> str:
    """The package with rooms that a module is in, or ""."""
    return next((name for name in HOUSES if f"{module}.".startswith(f"{name}.")), "")


def room_of(module: str) -> str:
    """What has a floor: nanochat.gpt, nanochat.kernels, experiments.mxfp4.layers, scripts, ..."""
    parts, inside = module.split("."), house_of(module)
    return ".".join(parts[: inside.count(".") + 2]) if inside else parts[0]


def floor_of(room: str) -> tuple[int, int] | None:
    """None for nanochat itself, which is on no floor: `from nanochat import __version__`."""
    return FLOOR.get(room, FLOOR.get(room.split(".")[0]))


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
    declared = ROOMS.get(room)
    inside = house_of(module)
    for other in sorted(imported):
        target = room_of(other)
        floor = floor_of(target)
        if floor is None:
            continue
        if floor > (floor_of(room) or (0, 0)):
            found.append(f"{path} imports {other}, which is on a floor above")
        allowed = declared.may_import if declared else None
        allowed_rooms = (room, *(f"{inside}.{name}" for name in allowed or ()))
        if allowed is not None and house_of(other) == inside and target not in allowed_rooms:
            found.append(f"{path} imports {other}, which {room} does not declare")
        # a bench and an experiment are folders of parts; a script is one file
        package, its_package = room.split(".")[0], target.split(".")[0]
        own_part = its_package == package != "scripts" or other.startswith(module + ".")
        if package in ENTRY_POINTS and its_package in ENTRY_POINTS and not own_part:
            found.append(f"{path} imports {other}: entry points do not import each other")
    return found


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
        ("experiments/mxfp4/precision.py", "from scripts import base_train", "entry points"),
        ("experiments/mxfp4/speed/x.py", "from bench import measure", "entry points"),
        ("bench/test_gpt.py", "from experiments.mxfp4.numbers import formats", "entry points"),
        ("experiments/mxfp4/numbers/x.py", "import experiments.mxfp4.kernels.gemm", "floor above"),
        ("experiments/mxfp4/layers/x.py", "from experiments.mxfp4 import studies", "floor above"),
        ("experiments/mxfp4/speed/x.py", "from experiments.mxfp4 import studies", "not declare"),
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
        ("experiments/mxfp4/precision.py", "from experiments.mxfp4.layers import linear"),
        ("experiments/mxfp4/kernels/x.py", "from experiments.mxfp4.numbers.formats import FORMATS"),
        ("experiments/mxfp4/numbers/x.py", "from nanochat.serve import answer"),
    ],
)
def test_the_rule_allows_the_rest(path, source):
    assert violations(path, source) == []


PLUG_IN_POINT = "nanochat/train/precision.py"


def names_of_experiments(source: str) -> list[str]:
    """Imports of experiments/, and strings that an import of it could be made from."""
    tree = ast.parse(source)
    found = [name for name in imports(source)[0] if name.split(".")[0] == "experiments"]
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in prose and isinstance(node.value, str)
    )
    return found + [x for x in texts if x == "experiments" or x.startswith("experiments.")]


def test_only_the_plug_in_point_reaches_experiments():
    """A name put together at run time is an import that `imports` does not see."""
    below = sources("nanochat", "tasks", "scripts", "bench")
    found = {path: names_of_experiments((ROOT / path).read_text()) for path in below}
    assert {path: names for path, names in found.items() if names} == {
        PLUG_IN_POINT: ["experiments"]
    }


def test_the_plug_in_point_loads_nothing_but_a_precision():
    source = (ROOT / PLUG_IN_POINT).read_text()
    loaded = [
        ast.unparse(node.args[0])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
    ]
    assert sorted(loaded) == ["EXPERIMENTS", "f'{EXPERIMENTS}.{name}.precision'"]
    for path in ROOT.glob("experiments/*/precision.py"):
        functions = {x.name for x in ast.parse(path.read_text()).body if hasattr(x, "name")}
        assert {"prepare", "accept_weights"} <= functions, path


def test_rooms_declare_what_is_inside():
    """The docstrings name the files that are there, on floors that exist."""
    offenders = []
    doors = {name: house.read_room(folder / "__init__.py") for name, folder in HOUSES.items()}
    for name, room in {**doors, **ROOMS}.items():
        here = {path.stem for path in (ROOT / name.replace(".", "/")).glob("*.py")} - {"__init__"}
        offenders += [f"{name} does not list {x}" for x in sorted(here - {*room.modules})]
        offenders += [f"{name} has no {x}" for x in sorted({*room.modules} - here)]
        if name in ROOMS and room.may_import is None:
            offenders.append(f"{name} does not say what it may import")
    placed = {name for name in FLOOR if house_of(name)}
    units = {*ROOMS, *(f"{name}.{x}" for name, door in doors.items() for x in door.modules)}
    offenders += [f"{name} has no floor" for name in sorted(units - placed)]
    offenders += [f"{name} has a floor and no file" for name in sorted(placed - units)]
    assert not offenders, "\n".join(offenders)


def test_rooms_declare_no_import_they_do_not_use():
    """So that the drawing shows arrows that exist."""
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for path in sources("nanochat", "experiments"):
        room = room_of(module_name(path))
        if room in used:
            found, _ = imports((ROOT / path).read_text())
            used[room] |= {room_of(other) for other in found} - {room}
    offenders = [
        f"{name} declares {other} and does not import it"
        for name, room in ROOMS.items()
        for other in sorted(room.may_import or ())
        if f"{house_of(name)}.{other}" not in used[name]
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
