"""docs/your_first_kernel.md: its file, dropped into the folder, is found, tested, compiled, timed.

Everything happens in a copy of the repository, by the page's own commands.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.kernels.aot import SHIPPED

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/your_first_kernel.md").read_text(encoding="utf-8")
SOURCE = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S))
COPIED = ("nanochat", "bench", "dev", "conftest.py", "pyproject.toml", "tests/conftest.py",
          "tests/kernels/test_kernels.py")  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the page's file in it, and nothing else changed."""
    root = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)
    (root / "nanochat/kernels/squared_relu.py").write_text(SOURCE, encoding="utf-8")
    return root


def documented(part: str, *more: str) -> list[str]:
    """The page's command that contains `part`, with arguments added."""
    (line,) = [x for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.M | re.S)
               for x in block.splitlines() if part in x]  # fmt: skip
    words = shlex.split(line)
    words = words[1:] if words[0] == "python" else ["-m", *words]
    return [sys.executable, *words, *more]


def run(tree: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    # as a person types it: neither interpreted nor a worker of the run that this test is part of
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
    }
    environment["PYTHONPATH"] = str(tree)
    # building C++ for the bench's other contender is slow
    environment["TORCH_COMPILE_DISABLE"] = "1"
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


QUICK = ("-q", "-p", "no:cacheprovider")


def test_the_generic_tests_find_it_and_it_passes(tree: Path) -> None:
    done = run(tree, documented("test_kernels.py -k", *QUICK))
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    # reference and triton in three dtypes; strides, contract and trace of triton
    assert passed is not None
    assert int(passed[1]) == 9


def test_the_generic_tests_refuse_it_when_it_is_wrong(tree: Path) -> None:
    path = tree / "nanochat/kernels/squared_relu.py"
    wrong = SOURCE.replace("(positive * positive)", "(positive * positive / 3)")
    assert wrong != SOURCE
    path.write_text(wrong, encoding="utf-8")
    try:
        done = run(tree, documented("test_kernels.py -k", *QUICK, "-rf", "--tb=no"))
    finally:
        path.write_text(SOURCE, encoding="utf-8")
    assert done.returncode == 1, done.stdout
    failed = {line for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert len(failed) == 3
    assert all("multiple_of_eager[squared_relu-triton-" in line for line in failed)


def test_the_gate_compiles_it(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = run(tree, documented("kernels.aot", "--json", str(out)))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert {row["target"] for row in rows} == set(SHIPPED)
    assert {row["kernel"] for row in rows} == {"forward_kernel", "backward_kernel"}
    assert {row["op"] for row in rows} == {"squared_relu"}


SELECTED = """
import torch
from dev.kernel_table import table
from nanochat.kernels.registry import select

choices = {c.op: c for c in select("auto", torch.device("cpu"), torch.float32)}
choice = choices["squared_relu"]
print(choice.implementation, *choice.refused)
print(table())
"""


def test_selection_and_the_table_know_it(tree: Path) -> None:
    lines = run(tree, [sys.executable, "-c", SELECTED]).stdout.splitlines()
    assert lines[0] == "reference triton"
    assert "| `squared_relu` | `triton` | one pass over memory each way |" in lines


def test_the_bench_has_its_row(tree: Path, tmp_path: Path) -> None:
    done = run(tree, documented("bench/test_kernels.py", "--out", str(tmp_path), *QUICK))
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "kernels.json").read_text())
    found = {(row["contender"], row["pass"]): row["status"] for row in rows}
    assert found["eager", "both"] == "timed"
    assert ("triton", "both") in found
