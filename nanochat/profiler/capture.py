"""Steady training steps under torch.profiler, with ranges that carry our names.

    capture = StepCapture(model, optimizers, steps=3, on_gpu=False, compiled=False)
    while ...:
        capture.begin()
        train_step(...)
        found = capture.end(seconds)     None until the last of the steps

Nothing is installed before the first begin() or after the last end(): a run without a profile calls
its operations as if this file did not exist. The first step is a warm-up and is not recorded.

A compiled model is left alone: a wrapper around an operation would be traced into the graph, which
would have to be compiled again. Its custom operators tell what runs (timeline.py).
"""

import contextlib
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._library.custom_ops
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from nanochat.kernels.registry import REGISTRY, Cost, Op, operations
from nanochat.profiler import timeline
from nanochat.profiler.ranges import watched
from nanochat.profiler.timeline import BACKWARD, EVALUATE, FORWARD, MODULE, OPERATION, OPTIMIZER

TRACED_STEPS = 2  # in the file for Perfetto: more of the same would make it slow to open
RUNTIME = ("cuda", "cuLaunch", "cuMem", "cuEvent", "cuStream", "cuGraph")
USER_SCOPE = 7  # at::RecordScope::USER_SCOPE, what record_function opens
Key = tuple[str, str]  # category, operation


def stage(name: str) -> AbstractContextManager[object]:
    """A range of a step while a profiler runs, otherwise nothing."""
    if not torch.autograd._profiler_enabled():
        return contextlib.nullcontext()
    return record_function(timeline.STAGE + name)


@dataclass
class Tally:
    """What the operations of all profiled steps had to do, by (category, operation)."""

    calls: Counter[Key] = field(default_factory=Counter)
    flops: defaultdict[Key, float] = field(default_factory=lambda: defaultdict(float))
    bytes: defaultdict[Key, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, operation: str, cost: Cost) -> None:
        """A call: of the forward pass, whose backward pass will follow, where gradients are on."""
        parts = {OPTIMIZER: cost}
        if torch.is_grad_enabled():
            parts = {FORWARD: cost}
            if cost.backward is not None:
                parts[BACKWARD] = cost.backward
        for category, part in parts.items():
            key = category, operation
            self.calls[key] += 1
            self.flops[key] += part.flops
            self.bytes[key] += part.bytes


class Ranges:
    """Ranges around operations and modules: in the trace, and in the order of autograd's nodes."""

    def __init__(self) -> None:
        self.open: list[tuple[str, record_function]] = []
        self.sequence_points: list[tuple[int, str]] = []
        self.tally = Tally()
        self.costs: dict[Any, Cost] = {}

    def enter(self, kind: str, name: str) -> None:
        """A module, an operation or an optimizer begins."""
        prefix, label = (OPERATION, name) if kind == "operation" else (MODULE, short_name(name))
        span = record_function(prefix + label)
        span.__enter__()
        self.open.append((label, span))
        self._mark(label)

    def leave(self) -> None:
        """What began last ends."""
        _, span = self.open.pop()
        span.__exit__(None, None, None)
        self._mark(self.open[-1][0] if self.open else "")

    def _mark(self, label: str) -> None:
        # the number that autograd will give to the next node that this thread makes
        self.sequence_points.append((torch.autograd._get_sequence_nr(), label))

    def counting(self, op: Op, entering: bool) -> Callable[[Callable[..., Any]], Any]:
        """A wrapper of an implementation that adds up its cost, and may open a range itself."""

        def wrapper(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                self.tally.add(op.name, self.cost(op, args, kwargs))
                if not entering:
                    return call(*args, **kwargs)
                self.enter("operation", op.name)
                try:
                    return call(*args, **kwargs)
                finally:
                    self.leave()

            return counted

        return wrapper

    def cost(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
        """Of a call; calls of one shape are computed once, in the warm-up."""
        key = op.name, *map(_signature, args), *((k, _signature(v)) for k, v in kwargs.items())
        if key not in self.costs:
            self.costs[key] = op.cost(*args, **kwargs)
        return self.costs[key]


def _signature(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def short_name(module: str) -> str:
    """The name of a module without its layer: "blocks.3.attn.c_qkv" is "attn.c_qkv"."""
    return re.sub(r"(^|(?<=\.))\w+\.\d+(\.|$)", "", module) or "block"


def module_cost(module: nn.Module, inputs: tuple[Any, ...]) -> Cost | None:
    """Of a matrix product or an embedding of torch; None of any other module.

    Every tensor that comes in or goes out is moved once; the weights in the dtype of the product.
    """
    x = inputs[0] if inputs else None
    if not isinstance(x, Tensor):
        return None
    if isinstance(module, nn.Linear):
        rows, weight, size = x.numel() // module.in_features, module.weight.numel(), x.itemsize
        moved, y = x.numel() + weight, rows * module.out_features
        flops = 2 * rows * weight
        # x, W and dy in, dx and dW out
        return Cost(flops, (moved + y) * size, Cost(2 * flops, (2 * moved + y) * size))
    if isinstance(module, nn.Embedding):
        y, size = x.numel() * module.embedding_dim, module.weight.itemsize
        return Cost(0, 2 * y * size, Cost(0, (y + module.weight.numel()) * size))
    return None


def optimizer_operations(optimizers: Sequence[torch.optim.Optimizer]) -> list[Op]:
    """The operations that optimizers call: those that the modules of their classes import."""
    modules = {kind.__module__ for optimizer in optimizers for kind in type(optimizer).__mro__}
    return [
        op
        for op in REGISTRY.values()
        if any(
            value is op
            for name in modules
            if name.startswith("nanochat.")
            for value in vars(__import__(name, fromlist=["_"])).values()
        )
    ]


@dataclass(frozen=True)
class Captured:
    """What `StepCapture` saw; totals of all steps.

    seconds  of each step, by the host's clock beside the profiler
    """

    division: timeline.Division
    tally: Tally
    seconds: list[float]


class StepCapture:
    """Profiles `steps` steps after one for warm-up.

    compiled  the model runs through torch.compile
    trace     where the first steps go, for ui.perfetto.dev: a .json.gz; None writes none
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        steps: int,
        on_gpu: bool,
        compiled: bool = False,
        trace: Path | None = None,
    ) -> None:
        self.model, self.optimizers, self.steps = model, optimizers, steps
        self.on_gpu, self.compiled, self.trace = on_gpu, compiled, trace
        self.ranges = Ranges()
        self.seconds: list[float] = []
        self.events: list[timeline.Event] = []
        self.begun = 0
        self.stack = contextlib.ExitStack()
        self.profiler: profile | None = None
        self.step_range: AbstractContextManager[object] = contextlib.nullcontext()

    def begin(self) -> None:
        """Before the first batch of a step."""
        if self.profiler is None:
            self._install()
        if self.begun == 1:  # the warm-up is over
            self.ranges.tally = Tally()
        self.begun += 1
        self.step_range = stage("step")
        self.step_range.__enter__()

    def end(self, seconds: float) -> Captured | None:
        """After a step of so many seconds; what was found, after the last one."""
        assert self.profiler is not None, "begin() comes first"
        self.step_range.__exit__(None, None, None)
        if self.begun > 1:
            self.seconds.append(seconds)
        last = self.begun == self.steps + 1
        if last:
            self._uninstall()
        self.profiler.step()
        if not last:
            return None
        self.close()
        marks = timeline.Marks(self.ranges.sequence_points)
        names = operators()
        division = timeline.divide(self.events, marks, names, self.on_gpu)
        if self.trace is not None:
            name_backward(self.trace, marks)
        return Captured(division, self.ranges.tally, self.seconds)

    def close(self) -> None:
        """Stop, whatever was recorded."""
        self._uninstall()
        if self.profiler is not None:
            self.profiler.stop()

    def _install(self) -> None:
        operations()
        ranges, enter = self.ranges, self.stack.enter_context
        if self.compiled:
            ops = optimizer_operations(self.optimizers)
        else:
            ops = list(REGISTRY.values())
            enter(watched(self.model, self.optimizers, ranges.enter, ranges.leave))
            for name, module in self.model.named_modules():
                hook = module.register_forward_pre_hook(self._counting(short_name(name)))
                self.stack.callback(hook.remove)
        for op in ops:
            enter(op.wrapped(ranges.counting(op, entering=self.compiled)))
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        plan = schedule(wait=0, warmup=1, active=self.steps, repeat=1)
        self.profiler = profile(
            activities=activities, schedule=plan, on_trace_ready=self._read, acc_events=True
        )
        self.profiler.start()

    def _uninstall(self) -> None:
        self.stack.close()

    def _counting(self, label: str) -> Callable[[nn.Module, Any], None]:
        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            cost = module_cost(module, inputs)
            if cost is not None:
                self.ranges.tally.add(label, cost)

        return count

    def _read(self, profiler: profile) -> None:
        results = profiler.profiler and profiler.profiler.kineto_results
        assert results is not None, "torch calls this when a trace is ready"
        self.events = [_event(event) for event in results.events()]
        if self.trace is not None:
            self.trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.trace))


def _event(event: Any) -> timeline.Event:
    """One of torch's, as timeline.py takes them."""
    on_gpu = event.device_type() != DeviceType.CPU
    linked = event.linked_correlation_id()
    # calls of the CUDA runtime number themselves otherwise than operations of torch
    is_operation = not on_gpu and not linked and not event.name().startswith(RUNTIME)
    return timeline.Event(
        event.name(),
        event.start_ns(),
        event.end_ns(),
        event.device_resource_id() if on_gpu else event.start_thread_id(),
        on_gpu,
        event.sequence_nr(),
        event.correlation_id() if is_operation else 0,
        linked if on_gpu else 0,
        event.is_user_annotation() or event.scope() == USER_SCOPE,
    )


def operators() -> dict[str, str]:
    """Custom operator, as events call it -> the operation whose file defines it."""
    found = {}
    for name, definition in torch._library.custom_ops.OPDEFS.items():
        file = definition._init_fn.__module__.rpartition(".")[2]
        plain = name.removeprefix("nanochat::").removesuffix("_backward")
        named = [op for op in REGISTRY if plain == op or file.startswith(op)]
        if name.startswith("nanochat::") and named:
            found[name] = plain if plain in REGISTRY else max(named, key=len)
    return found


def name_backward(path: Path, sequence_marks: timeline.Marks) -> None:
    """Cut a trace to its first steps, and give the nodes of the backward pass our names."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    events = trace["traceEvents"]
    steps = sorted((e for e in events if e.get("name") == timeline.STEP), key=lambda e: e["ts"])
    begin = steps[0]["ts"]
    last = steps[min(TRACED_STEPS, len(steps)) - 1]
    end = last["ts"] + last["dur"]
    kept = [e for e in events if e["ph"] == "M" or begin <= e.get("ts", begin) <= end]
    for event in kept:
        if event.get("name", "").startswith(EVALUATE):
            label = sequence_marks.at(event.get("args", {}).get("Sequence number", -1))
            node = event["name"].removeprefix(EVALUATE)
            event["name"] = f"{label or timeline.OTHER}, backward ({node})"
    with opened(path, "wt", encoding="utf-8") as file:
        json.dump(trace | {"traceEvents": kept}, file)
