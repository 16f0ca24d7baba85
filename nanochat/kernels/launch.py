"""Launching Triton kernels: the configuration of each GPU, the interpreter, a recorder.

Configurations are data: configs/<architecture>.json maps a kernel's name to its tile sizes, warps
and stages, for sizes up to a limit, with the origin of each entry; generic.json is for GPUs without
a file of their own. `bench/tune.py` rewrites them from measurements.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

from nanochat.kernels import interpreter

CONFIGS = Path(__file__).parent / "configs"
GENERIC = "generic"
SELECTORS = ("up_to", "element_size", "origin")


@dataclass
class Recorder:
    """Collects launches instead of running them, as if on a GPU of `architecture`.

    lookups  kernel name, size and element size of each configuration asked for.
    """

    architecture: str
    launches: list["Launch"] = field(default_factory=list)
    lookups: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Launch:
    """One recorded launch; `arguments` as the kernel would have got them."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[Recorder]:
    """Within the block, `launch` records and `config` answers for `architecture`.

    The tensors of the block may live on the CPU; nothing writes to them.
    """
    recorder = Recorder(architecture)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def current_recorder() -> Recorder | None:
    """The recorder of the `recording` block this runs in, or None where kernels run."""
    return _recorder.get()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` over `grid`; options are its constants, num_warps and num_stages."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, arguments, options))
    elif isinstance(kernel, InterpretedFunction):
        interpreter.mend()
        with np.errstate(all="ignore"):  # masked lanes compute on padding
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def cdiv(a: int, b: int) -> int:
    """Programs that cover `a` elements in blocks of `b`."""
    return -(-a // b)


def needs_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Reason why no Triton kernel can run there, or ""."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    if device.type == "cuda" or knobs.runtime.interpret:
        return ""
    return f"Triton compiles for GPUs, not for {device.type} (TRITON_INTERPRET=1 emulates one)"


def worth_compiling(device: torch.device, dtype: torch.dtype) -> str:
    """Reason against choosing a Triton kernel unasked, or ""."""
    return "" if device.type == "cuda" else "interpreted: exact, and thousands of times slower"


def preferred(op: str, implementation: str) -> Callable[[torch.device, torch.dtype], str]:
    """`auto` of one of several Triton implementations: the tables name the one to take.

    The reason against the others is the origin that the entry "<op>.auto" gives.
    """

    def reason(device: torch.device, dtype: torch.dtype) -> str:
        entry = table(architecture_of(device))[f"{op}.auto"][0]
        if entry["implementation"] != implementation:
            return f"{entry['implementation']} is preferred: {entry['origin']}"
        return worth_compiling(device, dtype)

    return reason


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Name of the configuration table for a device: sm_90, sm_120, ... or generic."""
    if device.type != "cuda":
        return GENERIC
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if (CONFIGS / f"{name}.json").exists() else GENERIC


@functools.cache
def table(architecture: str) -> dict[str, Any]:
    """The configuration table of an architecture, over the generic one."""
    names = dict.fromkeys((GENERIC, architecture))
    merged: dict[str, Any] = {}
    for name in names:
        merged |= json.loads((CONFIGS / f"{name}.json").read_text())
    return merged


def config(name: str, like: torch.Tensor, size: int) -> dict[str, int]:
    """Constants, num_warps and num_stages of kernel `name` (such as "rms_norm.forward").

    The first entry counts whose "element_size" is that of `like` and whose "up_to" is at least
    `size`; an entry without them takes every dtype, every size.
    """
    recorder = _recorder.get()
    architecture = recorder.architecture if recorder else architecture_of(like.device)
    if recorder:
        recorder.lookups.append((name, size, like.element_size()))
    for entry in table(architecture)[name]:
        fits = like.element_size() == entry.get("element_size", like.element_size())
        if fits and size <= entry.get("up_to", size):
            return {key: value for key, value in entry.items() if key not in SELECTORS}
    raise ValueError(
        f"{name}: no configuration of {architecture} covers size {size} in {like.dtype}; "
        f"choose the reference with --kernels={name.split('.')[0]}=reference"
    )
