"""The gate of ahead-of-time compilation: every shipped configuration, and what it refuses.

    python -m tests.kernels.test_aot

writes the budgets that hold until a design is meant to become slower: tests/kernels/budgets.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nanochat.kernels.registry import operations

pytestmark = pytest.mark.long


BUDGETS = Path(__file__).with_name("budgets.json")
COUNTED = ("registers", "shared_bytes", "special", "issued")
MORE = 1.02  # another release of the compiler may add an instruction or two


def budgets_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What kernels in bfloat16 take, in the order in which they are compiled, by kernel and GPU."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["dtype"] == "bfloat16":
            key = f"{row['target']} {row['op']}.{row['kernel']}"
            found.setdefault(key, []).append({name: row[name] for name in COUNTED})
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of the whole table, compiled in a process where Triton is not interpreted."""
    return compile_all(tmp_path_factory.mktemp("aot") / "aot.json")


def compile_all(path: Path) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nanochat.kernels.aot", "--json", str(path)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return json.loads(path.read_text())


def test_every_shipped_configuration_passes(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["faults"]] == []


@pytest.mark.parametrize("target", ["sm_90", "sm_120"])
def test_every_triton_implementation_is_compiled(rows: list[dict[str, Any]], target: str) -> None:
    with_triton = {op.name for op in operations().values() if op.triton_names()}
    for dtype in ("bfloat16", "float16", "float32"):
        compiled = {r["op"] for r in rows if (r["target"], r["dtype"]) == (target, dtype)}
        assert compiled == with_triton


def test_no_kernel_takes_more_than_its_budget(rows: list[dict[str, Any]]) -> None:
    """Registers, shared memory, special functions and instructions of a thread, seen without a GPU:
    what makes a design slow. A new kernel has no budget yet."""
    budgets, found = json.loads(BUDGETS.read_text()), budgets_of(rows)
    hint = "if this is meant: python -m tests.kernels.test_aot"
    assert {key: len(each) for key, each in found.items()} == {
        key: len(each) for key, each in budgets.items()
    }, hint
    exceeded = [
        f"{key} {name}: {got[name]}, its budget is {most[name]}"
        for key, each in found.items()
        for got, most in zip(each, budgets[key], strict=True)
        for name in COUNTED
        if most[name] is not None and (got[name] is None or got[name] > MORE * most[name])
    ]
    assert exceeded == [], hint


def test_interpreted_triton_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "nanochat.kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode != 0
    assert "unset it" in result.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        written = budgets_of(compile_all(Path(folder) / "aot.json"))
    lines = ",\n".join(f'"{key}": {json.dumps(each)}' for key, each in written.items())
    BUDGETS.write_text(f"{{\n{lines}\n}}\n")
