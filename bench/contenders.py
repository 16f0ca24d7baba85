"""Who is measured for an operation: eager and compiled PyTorch, every implementation, the peers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.peers import PEERS, MisfitError
from nanochat.kernels.optional_triton import TritonError, is_interpreting
from nanochat.kernels.registry import Op, select

EAGER, COMPILE, OURS, PEER = "eager", "compile", "ours", "peer"
# What code of ours, of Triton, of the compiler or of a peer raises when it cannot run something.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TritonError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Contender:
    """Something that computes an operation; `missing` says why it cannot take part here."""

    name: str
    role: str
    call: Callable[..., Any] | None
    missing: str = ""


def names(op: Op) -> list[str]:
    """Contenders of an operation, whether they can run here or not."""
    ours = [name for name in op.implementations if name != "reference"]
    return [EAGER, COMPILE, *ours, *PEERS.get(op.name, {})]


def contenders(op: Op, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """All of `names`, loaded where possible."""
    return [
        Contender(EAGER, EAGER, op.reference),
        Contender(
            COMPILE, COMPILE, torch.compile(op.reference, fullgraph=True, dynamic=False)
        ),
        *(
            _ours(op, name, device, dtype) for name in op.implementations if name != "reference"
        ),
        *(_peer(op, name, device) for name in PEERS.get(op.name, {})),
    ]  # fmt: skip


def _ours(op: Op, name: str, device: torch.device, dtype: torch.dtype) -> Contender:
    implementation = op.implementations[name]
    missing = implementation.needs(device, dtype)
    if not missing and name.startswith("triton") and is_interpreting():
        missing = "interpreted: there is no time to measure"
    return Contender(name, OURS, None if missing else implementation.call, missing)


def _peer(op: Op, name: str, device: torch.device) -> Contender:
    try:
        call = PEERS[op.name][name]()
    except (ImportError, MisfitError) as error:
        return Contender(name, PEER, None, str(error))
    except FAILURES as error:
        return Contender(name, PEER, None, f"fails to import: {first_line(error)}")
    if device.type != "cuda" and not name.startswith("torch"):
        return Contender(name, PEER, None, f"runs on CUDA, not on {device.type}")
    return Contender(name, PEER, call)


def auto_choices(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """operation -> implementation that `--kernels=auto` picks here."""
    return {choice.op: choice.implementation for choice in select("auto", device, dtype)}


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
