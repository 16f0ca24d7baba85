"""Which module may import which, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports its own floor or the ones before it, also inside functions.
FLOORS = (
    "configurator common hardware tracking",
    "kernels",
    "gpt scaling schedule collectives adamw muon tokenizer_base tokenizer chat_format"
    " hub_dataset embedded_corpus dataset dataloader conversation_loader"
    " document_source token_cache",
    "stage train_step policy_gradient checkpoint_manager checkpoint_reader engine execution"
    " precision confinement loss_eval"
    " core_eval core_bundle task_eval calculator sampling generation chat_session answer"
    " chat_server"
    " memory profiler report",
)
FLOOR = {f"nanochat.{name}": i for i, names in enumerate(FLOORS) for name in names.split()}
FLOOR |= {"tasks": 4, "scripts": 5, "bench": 5, "experiments": 5, "tests": 6}
PACKAGES = ("nanochat", "tasks", "scripts", "bench", "experiments", "tests")
ENTRY_POINTS = ("scripts", "bench", "experiments")

# Raising a limit is a change that a reviewer sees; the fix is usually a second idea in the file.
LINE_LIMITS = {
    "nanochat/kernels": 300,
    "nanochat": 350,
    "scripts": 290,
    "tasks": 200,
    "bench": 200,
    "experiments": 250,
}


def sources(*packages: str) -> list[str]:
    return [
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(module: str) -> str:
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
    imported, relative = imports(source)
    found = ["imports relatively"] if relative else []
    for other in sorted(imported):
        if room(other) not in FLOOR:  # nanochat itself, or `from nanochat import __version__`
            continue
        if FLOOR[room(other)] > FLOOR.get(room(module), 0):
            found.append(f"imports {other}, which is on a floor above")
        if room(module) == "nanochat.kernels" and room(other) != "nanochat.kernels":
            found.append(f"imports {other}: kernels use nothing of ours but kernels")
        # a bench and an experiment are folders of parts; a script is one file
        own_part = room(other) == room(module) != "scripts" or other.startswith(module + ".")
        if room(module) in ENTRY_POINTS and room(other) in ENTRY_POINTS and not own_part:
            found.append(f"imports {other}: entry points do not import each other")
    return found


@pytest.mark.parametrize("path", sources(*PACKAGES[:-1]))
def test_imports_go_down(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "part"),
    [
        ("nanochat/gpt.py", "from .muon import Muon", "relatively"),
        ("nanochat/gpt.py", "from nanochat.train_step import train_step", "floor above"),
        ("nanochat/gpt.py", "from nanochat import train_step", "floor above"),
        ("nanochat/gpt.py", "def f():\n    import nanochat.engine", "floor above"),
        ("nanochat/tracking.py", "import nanochat.kernels.registry", "floor above"),
        ("nanochat/engine.py", "from tasks.common import Task", "floor above"),
        ("nanochat/report.py", "from experiments.mxfp4 import train", "floor above"),
        ("nanochat/kernels/x.py", "from nanochat.common import print0", "nothing of ours"),
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
        ("nanochat/gpt.py", "from nanochat import muon"),
        ("nanochat/kernels/x.py", "from nanochat.kernels.registry import Op"),
        ("scripts/base_train.py", "from nanochat import __version__, stage"),
        ("experiments/mxfp4/train.py", "from experiments.mxfp4.linear import Linear"),
    ],
)
def test_the_rule_allows_the_rest(path, source):
    assert violations(path, source) == []


def test_every_module_has_a_floor():
    rooms = {room(module_name(path)) for path in sources("nanochat")} - {"nanochat"}
    missing = sorted(rooms - set(FLOOR))
    assert not missing, f"give {missing} a floor in FLOORS, and a line in the README's tree"


@pytest.mark.parametrize("path", sources(*PACKAGES[:-1]))
def test_files_are_read_in_one_sitting(path):
    limit = next(limit for folder, limit in LINE_LIMITS.items() if path.startswith(folder + "/"))
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= limit, f"{path} has {lines} lines, the limit is {limit}"
