"""The gate of ahead-of-time compilation: every shipped configuration, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.kernels.registry import operations

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Rows of the whole table, compiled in a process where Triton is not interpreted."""
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nanochat.kernels.aot", "--json", str(path)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return json.loads(path.read_text())


def test_every_shipped_configuration_passes(rows: list[dict[str, object]]) -> None:
    assert [row for row in rows if row["faults"]] == []


@pytest.mark.parametrize("target", ["sm_90", "sm_120"])
def test_every_triton_implementation_is_compiled(
    rows: list[dict[str, object]], target: str
) -> None:
    with_triton = {op.name for op in operations().values() if op.triton_names()}
    for dtype in ("bfloat16", "float16", "float32"):
        compiled = {r["op"] for r in rows if (r["target"], r["dtype"]) == (target, dtype)}
        assert compiled == with_triton


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
