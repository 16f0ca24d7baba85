"""On machines for which there is no wheel of the package triton, everything runs by reference."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.kernels import optional_triton

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]

# A process in which `import triton` fails as it does where the package is not installed.
HIDDEN = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""

STEPS = """
import torch
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.registry import format_choices, select

cpu, losses = torch.device("cpu"), {}
for spec in ("reference", "auto"):
    choices = select(spec, cpu, torch.float32)
    print(format_choices(choices))
    model = GPT(GPTConfig(16, 64, 1, 1, 1, 128), torch.float32)
    model.init_weights(0)
    optimizers = model.setup_optimizers(0.2, 0.004, 0.02, 0.0, distributed=False)
    tokens = torch.arange(32).view(2, 16)
    for _ in range(2):
        loss = model(tokens, tokens)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    print(f"{spec} loss {loss.item()}")
    losses[spec] = loss.item()
assert 0 < losses["reference"] < 4.1, losses  # it learns: ln 64 is 4.16
assert abs(losses["reference"] - losses["auto"]) < 1e-3, losses
try:
    select("rms_norm=triton", cpu, torch.float32)
except ValueError as error:
    print(error)
"""

REFUSALS = """
from nanochat.kernels import aot
from nanochat.kernels.optional_triton import compile_refusal

print(repr(compile_refusal("cpu")), compile_refusal("cuda"))
try:
    aot.main([])
except SystemExit as error:
    print(error)
"""

HELP = """
import runpy
sys.argv = ["base_train", "--help"]
runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HIDDEN + code],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_model_trains_by_reference_and_the_table_says_why() -> None:
    printed = run(STEPS)
    line = next(line for line in printed.split("auto loss")[0].splitlines()[::-1] if "rms" in line)
    assert re.fullmatch(
        r"  (add_)?rms_norm +reference +not triton: triton is not installed.*", line
    )
    assert all(len(line) <= 100 for line in printed.split("auto loss")[0].splitlines())
    assert "rms_norm=triton cannot run on cpu" in printed
    assert optional_triton.MISSING in printed.split("auto loss")[1]


def test_compilers_refuse_with_the_reason() -> None:
    compiled, gate = run(REFUSALS).splitlines()
    assert compiled.startswith("'' torch.compile generates Triton")
    assert gate == f"nanochat.kernels.aot: {optional_triton.MISSING}"


def test_help_starts() -> None:
    assert "--kernels" in run(HELP)


def test_one_module_alone_imports_the_package() -> None:
    """Whoever imports it directly breaks every machine without it."""
    direct = re.compile(r"^\s*(import|from) triton\b", re.MULTILINE)
    offenders = [
        path.relative_to(ROOT).as_posix()
        for folder in ("nanochat", "scripts", "tasks", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if direct.search(path.read_text())
    ]
    assert offenders == ["nanochat/kernels/optional_triton.py"]
