"""Triton's Proton with our names, FLOPs and bytes.

    with proton_profile(Path("proton")):
        train_step(...)
    proton-viewer -m time/ms,tflop/s,gbyte/s proton.hatchet

A pass of an operation may launch several kernels, and the cost is that of the pass: its first
launch carries all of it, the others none. So the FLOPs and bytes below "relu2_mlp, backward" are
those of `Cost.backward`, whichever implementation ran. Not measured: Proton needs a GPU.
"""

import contextlib
import importlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.kernels import optional_triton
from nanochat.kernels.launch import describers
from nanochat.kernels.registry import Cost, Op, operations


@dataclass
class Call:
    """A call of an operation, and which of its passes have launched a kernel."""

    operation: str
    cost: Cost
    told: set[str] = field(default_factory=set)


class LaunchCosts:
    """Says of every launch which pass of which call it belongs to."""

    def __init__(self) -> None:
        self.open: list[Call] = []
        # (sequence number from which on autograd's nodes are those of the call, call)
        self.nodes: list[tuple[int, Call | None]] = []

    def following(self, op: Op) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A wrapper that notes calls and the numbers of the nodes made in them."""

        def wrapper(call: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                self.open.append(Call(op.name, op.cost(*args, **kwargs)))
                self._mark()
                try:
                    return call(*args, **kwargs)
                finally:
                    self.open.pop()
                    self._mark()

            return noted

        return wrapper

    def _mark(self) -> None:
        number = torch.autograd._get_sequence_nr()
        self.nodes.append((number, self.open[-1] if self.open else None))

    def describe(self, kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Name, FLOPs and bytes of a launch, as Proton calls them."""
        call, name = self._running()
        if call is None:
            return {}
        found: dict[str, Any] = {"name": f"{call.operation}, {name}: {kernel}"}
        cost = call.cost if name == "forward" else call.cost.backward
        if cost is None or name in call.told:
            return found
        call.told.add(name)
        sizes = [x.itemsize for x in arguments.values() if _is_floating(x)]
        # Proton keeps a peak for each width of a number
        width = f"flops{8 * sizes[0]}" if sizes else "flops"
        return found | {width: cost.flops, "bytes": cost.bytes}

    def _running(self) -> tuple[Call | None, str]:
        if torch._C._current_graph_task_id() == -1:
            return (self.open[-1] if self.open else None), "forward"
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        index = bisect_right(self.nodes, number, key=lambda point: point[0])
        return (self.nodes[index - 1][1] if index else None), "backward"


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextlib.contextmanager
def launch_costs() -> Iterator[LaunchCosts]:
    """Within the block, the launch hooks of Triton are told what our operations cost."""
    costs = LaunchCosts()
    with contextlib.ExitStack() as stack:
        for op in operations().values():
            stack.enter_context(op.wrapped(costs.following(op)))
        describers.append(costs.describe)
        stack.callback(describers.remove, costs.describe)
        yield costs


@contextlib.contextmanager
def proton_profile(path: Path) -> Iterator[None]:
    """Within the block, Proton records; at its end it writes `path` with the ending .hatchet.

    Raises  ValueError without a CUDA device, or without Triton.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "--proton needs a CUDA device: Proton measures kernels on a GPU; leave it out, "
            "--profile works everywhere"
        )
    if not optional_triton.installed:
        raise ValueError(f"--proton needs Triton's profiler: {optional_triton.MISSING}")
    proton = importlib.import_module("triton.profiler")
    path.parent.mkdir(parents=True, exist_ok=True)
    proton.start(str(path), hook="triton")
    try:
        with launch_costs():
            yield
    finally:
        proton.finalize()
