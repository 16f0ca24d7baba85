"""Launching Triton kernels: the configuration of each GPU, the interpreter, a recorder.

    TILES = Config("my_op.forward", {"BLOCK": 1024, "num_warps": 4, "origin": "not measured"})
    ...
    options = TILES.choose(x, x.numel())
    launch(kernel, (cdiv(x.numel(), options["BLOCK"]),), x, y, x.numel(), **options)

A `Config` stands in the operation's file with what any GPU runs. configs/<architecture>.json may
name better entries for one GPU; `bench/tune.py` writes those from measurements.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.kernels import interpreter, optional_triton
from nanochat.kernels.optional_triton import triton

TABLES = Path(__file__).parent / "configs"
GENERIC = "generic"  # the architecture of everything that is not a CUDA GPU
MULTIPROCESSORS = {"sm_90": 132, "sm_120": 170}  # of an H100 SXM or H200; of an RTX 5090
SELECTORS = ("up_to", "element_size", "origin")
Entry = dict[str, Any]
CONFIGS: dict[str, "Config"] = {}  # by kernel


@dataclass
class Recorder:
    """Collects launches instead of running them, as if on a GPU of `architecture`.

    lookups  each configuration asked for, the size, the element size, and the entry that answered.
    """

    architecture: str
    launches: list["Launch"] = field(default_factory=list)
    lookups: list[tuple["Config", int, int, Entry]] = field(default_factory=list)


@dataclass(frozen=True)
class Launch:
    """One recorded launch; `arguments` as the kernel would have got them."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...] = (1,)


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
    if not optional_triton.installed:
        raise RuntimeError(optional_triton.MISSING)
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, arguments, options, grid))
    elif isinstance(kernel, triton.runtime.interpreter.InterpretedFunction):
        interpreter.patch()
        with np.errstate(all="ignore"):  # masked lanes compute on padding
            kernel[grid](*arguments, **options)
    else:
        kernel.launch_metadata = launch_metadata
        kernel[grid](*arguments, **options)


def multiprocessors(device: torch.device) -> int:
    """Of the GPU that launches run on, or are recorded for.

    The interpreter has two, so that persistent programs share their tiles there as well.
    """
    recorder = _recorder.get()
    if recorder is not None:
        return MULTIPROCESSORS.get(recorder.architecture, 2)
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


# of whoever profiles, the newest last; one list for all threads, as autograd launches from its own
describers: list[Callable[[str, dict[str, Any]], dict[str, Any]]] = []


def launch_metadata(grid: Any, metadata: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What Triton tells its launch hooks, Proton's among them, of a launch; not asked without one.

    A describer gets the kernel's name and its arguments by name.
    """
    return describers[-1](metadata.name, arguments) if describers else {}


def cdiv(a: int, b: int) -> int:
    """Programs that cover `a` elements in blocks of `b`."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n: blocks of Triton have such sizes."""
    return 1 << (n - 1).bit_length()


def needs_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Reason why no Triton kernel can run there, or ""."""
    if not optional_triton.installed:
        return optional_triton.MISSING
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    if device.type == "cuda" or optional_triton.is_interpreting():
        return ""
    return f"Triton compiles for GPUs, not for {device.type} (TRITON_INTERPRET=1 emulates one)"


def worth_compiling(device: torch.device, dtype: torch.dtype) -> str:
    """Reason why `auto` does not choose a Triton kernel there, or ""."""
    return "" if device.type == "cuda" else "interpreted: exact, and thousands of times slower"


def architecture_of(device: torch.device) -> str:
    """What launches for tensors of `device` are compiled for: "sm_90", "sm_120", ... or "generic".

    Within `recording` it is the recorder's.
    """
    recorder = _recorder.get()
    return recorder.architecture if recorder else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return GENERIC
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def table(architecture: str, folder: Path = TABLES) -> dict[str, list[Entry]]:
    """kernel -> entries of one architecture; empty where the folder has no file for it."""
    path = folder / f"{architecture}.json"
    return json.loads(path.read_text()) if path.exists() else {}


class Config:
    """Constants, num_warps and num_stages of a kernel, for every size, dtype and GPU.

    kernel   such as "rms_norm.forward": the operation, a dot, the kernel; the key in the tables.
    default  entries for GPUs whose table has none. The first that fits counts: its
             "element_size" is that of the tensor, its "up_to" is at least the size; an entry
             without them takes every dtype, every size. "origin" says where its numbers are from.
    folder   of the tables, <architecture>.json.

    Raises  ValueError if the name is taken: the tables could not tell the two apart.
    """

    def __init__(self, kernel: str, *default: Mapping[str, Any], folder: Path = TABLES) -> None:
        if kernel in CONFIGS:
            raise ValueError(f"there is a configuration {kernel!r} already; choose another name")
        self.kernel = kernel
        self.default = [dict(entry) for entry in default]
        self.folder = folder
        CONFIGS[kernel] = self

    def entries(self, architecture: str) -> Sequence[Entry]:
        """Those of an architecture's table, or the defaults."""
        return table(architecture, self.folder).get(self.kernel, self.default)

    def choose(self, like: torch.Tensor, size: int = 0) -> dict[str, Any]:
        """The entry for a tensor of that dtype and device, and a size, without its selectors.

        Raises  ValueError where no entry covers the size.
        """
        architecture = architecture_of(like.device)
        # entries are in order: those for one dtype or for small sizes stand before the general one
        for entry in self.entries(architecture):
            fits = like.element_size() == entry.get("element_size", like.element_size())
            if fits and size <= entry.get("up_to", size):
                found = {key: value for key, value in entry.items() if key not in SELECTORS}
                recorder = _recorder.get()
                if recorder:
                    recorder.lookups.append((self, size, like.element_size(), found))
                return found
        raise ValueError(
            f"{self.kernel}: no configuration of {architecture} covers size {size} in "
            f"{like.dtype}; choose --kernels={self.kernel.split('.')[0]}=reference"
        )


def preferred(config: Config, implementation: str) -> Callable[[torch.device, torch.dtype], str]:
    """`auto` of one of several Triton implementations: `config` names the one to take.

    The reason against the others is the origin that its entry gives.
    """

    def reason(device: torch.device, dtype: torch.dtype) -> str:
        entry = config.entries(architecture_of(device))[0]
        if entry["implementation"] != implementation:
            return f"{entry['implementation']} is preferred: {entry['origin']}"
        return worth_compiling(device, dtype)

    return reason
