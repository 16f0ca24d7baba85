"""Kernel configurations: which ones a call uses, their neighbours, and the tables they live in."""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.contenders import make_case
from nanochat.kernels.launch import CONFIGS, TABLES, Config, Entry, Recorder, recording, table
from nanochat.kernels.registry import Op
from nanochat.kernels.workloads import Workload

RECORD_TOKENS = 128  # sizes of configurations are widths: row counts do not enter
MAX_WARPS, MAX_STAGES = 16, 6


@dataclass(frozen=True)
class Use:
    """A configuration that a call uses, from the forward pass on or in the backward pass only."""

    config: Config
    size: int
    element_size: int
    forward: bool
    entry: Entry


def record(
    op: Op, implementation: str, workload: Workload, architecture: str, dtype: torch.dtype
) -> tuple[Recorder, int]:
    """The recorder after a forward and a backward pass, and how many lookups the forward made.

    No kernel runs, and the tensors are on the CPU: a GPU's backward pass has a thread of its own,
    which a recorder does not see.
    """
    case = make_case(op, workload.small(RECORD_TOKENS), torch.device("cpu"), dtype)
    forward, *backward = case.stages(op.implementations[implementation].call)
    with recording(architecture) as recorder:
        value = forward(None)
        in_forward = len(recorder.lookups)
        for stage in backward:
            stage(value)
    return recorder, in_forward


@functools.cache
def uses(
    op: Op, implementation: str, workload: Workload, architecture: str, dtype: torch.dtype
) -> list[Use]:
    """Every configuration a call looks up, once."""
    recorder, in_forward = record(op, implementation, workload, architecture, dtype)
    found: dict[tuple[Config, int, int], Use] = {}
    for i, (config, size, element_size, entry) in enumerate(recorder.lookups):
        use = Use(config, size, element_size, i < in_forward, entry)
        found.setdefault((config, size, element_size), use)
    return list(found.values())


@contextlib.contextmanager
def trial(architecture: str, config: Config, entry: Entry) -> Iterator[None]:
    """Within the block, a kernel has this configuration for every size and dtype."""
    entries = table(architecture, config.folder)
    shipped = entries.get(config.kernel)
    entries[config.kernel] = [entry]
    try:
        yield
    finally:
        if shipped is None:
            del entries[config.kernel]
        else:
            entries[config.kernel] = shipped


def neighbours(name: str, value: int) -> list[int]:
    """A constant's value and those next to it.

    What is no tile, warp or stage stays: the rows of a chunk, say, trade memory for time.
    """
    if name == "num_stages":
        return [v for v in (value, value - 1, value + 1) if 1 <= v <= MAX_STAGES]
    if name == "num_warps":
        return [v for v in (value, value // 2, 2 * value) if 1 <= v <= MAX_WARPS]
    if name.startswith(("BLOCK", "GROUP")):
        return [v for v in (value, value // 2, 2 * value) if v >= 1]
    return [value]


def candidates(shipped: Entry) -> list[Entry]:
    """The grid of neighbours, those that change fewest constants first; `shipped` leads."""
    grid = itertools.product(*(neighbours(name, value) for name, value in shipped.items()))
    entries = [dict(zip(shipped, point, strict=True)) for point in grid]
    return sorted(entries, key=lambda entry: sum(entry[name] != shipped[name] for name in shipped))


def with_measured(entries: Sequence[Entry], tuned: Entry) -> list[Entry]:
    """A kernel's entries with a measured one: measured ones first, the smallest size leading."""

    def covers(entry: Entry) -> list[Any]:
        return [entry.get(name) for name in ("element_size", "up_to")]

    def is_measured(entry: Entry) -> bool:
        return str(entry.get("origin")).startswith("measured")

    others = [entry for entry in entries if covers(entry) != covers(tuned)]
    measured = [entry for entry in others if is_measured(entry) and None not in covers(entry)]
    return sorted([tuned, *measured], key=covers) + [e for e in others if e not in measured]


def write_entry(folder: Path, architecture: str, kernel: str, tuned: Entry) -> None:
    """Put a measured entry into an architecture's table in `folder`, one entry a line.

    Where the folder has no such table yet, it begins as the shipped one.
    """
    path = folder / f"{architecture}.json"
    source = path if path.exists() else TABLES / path.name
    known = json.loads(source.read_text()) if source.exists() else {}
    entries = known.get(kernel) or CONFIGS[kernel].default  # which a table's entries replace
    known[kernel] = with_measured(entries, tuned)
    blocks = []
    for name, of_kernel in known.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in of_kernel)
        blocks.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
