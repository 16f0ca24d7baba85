"""Launching the kernels of block-scaled numbers: tiles of each GPU, and what its PTX can say."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from experiments.mxfp4.kernels import interpreter
from nanochat.kernels import launch as launcher

CONFIGS = Path(__file__).parent / "configs.json"
GENERIC = "generic"
INTERPRETER = "interpreter"
# cvt to E2M1 is an instruction from sm_100 on; before, and in the interpreter, integers do the same
E2M1_CAPABILITY = 100


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """Architecture -> kernel -> tile sizes, warps, stages, and "origin": where they are from."""
    return json.loads(CONFIGS.read_text())


def target_of(device: torch.device) -> str:
    """Where a launch for tensors of `device` goes: "sm_120", ..., or "interpreter"."""
    recorder = launcher.current_recorder()
    if recorder is not None:
        return recorder.architecture
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def converts_to_e2m1(target: str) -> bool:
    """Whether PTX of `target` has the conversion; the same numbers come out without it."""
    return target != INTERPRETER and int(target.removeprefix("sm_")) >= E2M1_CAPABILITY


def config(name: str, target: str) -> dict[str, int]:
    """Constants, num_warps and num_stages of kernel `name` (such as "quantize.tiles")."""
    entry = table()[target if name in table().get(target, {}) else GENERIC][name]
    return {key: value for key, value in entry.items() if key != "origin"}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` over `grid`, compiled or interpreted, or record it."""
    if isinstance(kernel, InterpretedFunction):
        interpreter.mend()
    launcher.launch(kernel, grid, *arguments, **options)
