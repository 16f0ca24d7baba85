"""Events of a profiler -> who had each nanosecond of a step: stage, operation, or nobody.

On a CPU the host's own thread is divided: what runs there is what the step waits for. On a GPU its
kernels are, each under the operation that launched it, whenever it ran:

    host      | forward: rms_norm | attn.c_qkv |  ...  | reading the loss          |
    kernels         | rms_norm   |     c_qkv       | idle |  rms_norm, backward | ...

The backward pass calls no operation: autograd runs nodes, on a thread of its own where there is a
GPU. A node carries the sequence number that it got when the forward pass made it, so the operation
that ran when the number was given out is the one whose gradient the node computes.

Worked example: rms_norm takes numbers 4 to 6 forward, attn.c_qkv 7 and 8. The event "autograd::
engine::evaluate_function: MmBackward0" with number 8 is backward time of attn.c_qkv.
"""

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
COMMUNICATION, IDLE = "communication", "idle"
CATEGORIES = (DATA, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION, IDLE)
STAGE, OPERATION, MODULE = "stage: ", "op: ", "module: "  # how the names of our ranges begin
STEP = STAGE + "step"
OTHER = "other"  # of a stage, but in no operation or module
ACCUMULATION = "gradient accumulation"
UNKNOWN = "no known launcher"
FUSED, PRODUCTS = "compiled, fused", "compiled, matrix products"

EVALUATE = "autograd::engine::evaluate_function: "
COLLECTIVES = ("c10d::", "gloo:", "nccl")
COMPILED = ("Torch-Compiled Region", "CompiledFunction", EVALUATE + "CompiledFunction")
MATRIX_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_scaled_mm")
COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Event:
    """Something that ran, on the host or on the GPU.

    start, end  nanoseconds
    thread      of the host; the stream on a GPU
    sequence    of an autograd node or of what made it; -1 where there is none
    id, launcher  a kernel's launcher is the id of the host's event that launched it
    annotation  a range of ours or of torch, not an operation that computes
    """

    name: str
    start: int
    end: int
    thread: int = 0
    on_gpu: bool = False
    sequence: int = -1
    id: int = 0
    launcher: int = 0
    annotation: bool = False


class Marks:
    """What holds from each point on: of times or of sequence numbers."""

    def __init__(self, points: Iterable[tuple[int, str]] = ()) -> None:
        points = list(points)
        self.starts = [start for start, _ in points]
        self.labels = [label for _, label in points]

    def at(self, point: int) -> str:
        """The label that holds there, "" before the first one."""
        index = bisect_right(self.starts, point)
        return self.labels[index - 1] if index else ""

    @classmethod
    def of_nested(cls, intervals: Iterable[tuple[int, int, str]]) -> "Marks":
        """Of properly nested (start, end, label): the innermost holds, "" outside all."""
        points: list[tuple[int, str]] = []
        open_ends: list[tuple[int, str]] = []

        def close_until(time: int) -> None:
            while open_ends and open_ends[-1][0] <= time:
                end, _ = open_ends.pop()
                points.append((end, open_ends[-1][1] if open_ends else ""))

        for start, end, label in sorted(intervals, key=lambda x: (x[0], -x[1])):
            close_until(start)
            # clocks are read one after the other: an inner range must not outlive the outer one
            end = min(end, open_ends[-1][0]) if open_ends else end
            points.append((start, label))
            open_ends.append((end, label))
        close_until(2**63)
        return cls(points)


@dataclass
class Division:
    """Nanoseconds of all steps together, by (category, operation), and what happened beside them.

    top        by kernel (GPU) or by operation of torch without what it called (CPU): (time, calls)
    gaps       lengths of the idle times
    """

    steps: int
    nanoseconds: Counter[tuple[str, str]] = field(default_factory=Counter)
    top: dict[str, tuple[int, int]] = field(default_factory=dict)
    gaps: list[int] = field(default_factory=list)

    def by_category(self) -> dict[str, int]:
        """Of every category, in order."""
        totals: Counter[str] = Counter()
        for (category, _), time in self.nanoseconds.items():
            totals[category] += time
        return {category: totals[category] for category in CATEGORIES}


def divide(
    events: Sequence[Event], sequence_marks: Marks, operation_of: Mapping[str, str], on_gpu: bool
) -> Division:
    """Divide the steps that `events` hold.

    sequence_marks  sequence number -> operation of the forward pass
    operation_of    name of an event of a custom operator -> our operation
    Raises          ValueError if there is no step among the events.
    """
    return Divider(events, sequence_marks, operation_of).divide(on_gpu)


class Divider:
    """The host's view of the steps: stage and operation at every moment of every thread."""

    def __init__(
        self, events: Sequence[Event], sequence_marks: Marks, operation_of: Mapping[str, str]
    ) -> None:
        self.sequence_marks, self.operation_of = sequence_marks, operation_of
        self.host = [event for event in events if not event.on_gpu]
        self.kernels = [event for event in events if event.on_gpu and not event.annotation]
        steps = sorted((e for e in self.host if e.name == STEP), key=lambda e: e.start)
        if not steps:
            raise ValueError("the profiler recorded no whole step; profile at least one")
        self.main = steps[0].thread
        self.windows = [(step.start, step.end) for step in steps]
        self.autograd_threads = {e.thread for e in self.host if e.name.startswith(EVALUATE)}
        self.stages = Marks.of_nested(self._stage_intervals())
        self.labels = {
            thread: Marks.of_nested(self._label_intervals(thread))
            for thread in {self.main, *self.autograd_threads}
        }

    def _stage_intervals(self) -> Iterable[tuple[int, int, str]]:
        """Data until the first forward pass of a step, the optimizer where nothing else is said."""
        passes = [
            (e.start, e.end, e.name.removeprefix(STAGE))
            for e in self.host
            if e.thread == self.main and e.name in (STAGE + FORWARD, STAGE + BACKWARD)
        ]
        for start, end in self.windows:
            first = min((s for s, _, _ in passes if start <= s < end), default=end)
            yield start, end, OPTIMIZER
            yield start, first, DATA
        yield from passes

    def _label_intervals(self, thread: int) -> Iterable[tuple[int, int, str]]:
        mine = [event for event in self.host if event.thread == thread]
        regions = Marks.of_nested(
            (e.start, e.end, "yes") for e in mine if e.name.startswith(COMPILED)
        )
        for event in mine:
            label = self._label(event, bool(regions.at(event.start)))
            if label:
                yield event.start, event.end, label

    def _label(self, event: Event, compiled: bool) -> str:
        """The operation that an event stands for, "" for one that belongs to what it is in."""
        name = event.name
        if name.startswith(COLLECTIVES):
            return COMMUNICATION
        if name.startswith((OPERATION, MODULE)):
            return name.partition(": ")[2]
        if name.startswith(COMPILED):
            return FUSED
        if name.startswith(EVALUATE):
            if name.endswith("AccumulateGrad"):
                return ACCUMULATION
            return self.sequence_marks.at(event.sequence) or OTHER
        if not compiled:
            return ""
        # a compiled graph calls no operation of ours, but the custom operators that these are
        if "scaled_dot_product" in name:
            return "attention"
        return PRODUCTS if name in MATRIX_PRODUCTS else self.operation_of.get(name, "")

    def owner(self, thread: int, time: int) -> tuple[str, str]:
        """Category and operation of what the host does, or launches, there and then."""
        if thread != self.main and thread not in self.autograd_threads:
            return DATA, OTHER  # the loader's thread, which copies batches ahead
        stage = self.stages.at(time)
        label = self.labels[thread].at(time) or OTHER
        if label == COMMUNICATION:
            return COMMUNICATION, COMMUNICATION
        return (stage, OTHER) if stage == DATA else (stage, label)

    def divide(self, on_gpu: bool) -> Division:
        """Every nanosecond of every step once."""
        return self._divide_gpu() if on_gpu else self._divide_host()

    def _divide_host(self) -> Division:
        division = Division(len(self.windows))
        mine = [e for e in self.host if e.thread == self.main and not e.annotation]
        # what no operation of torch covers is Python; beside a collective it is waiting for it
        innermost = Marks.of_nested((e.start, e.end, e.name) for e in mine)
        # gloo's own ranges, on its threads
        sending = (e for e in self.host if e.thread != self.main)
        sent = Marks.of_nested(
            _union((e.start, e.end) for e in sending if e.name.startswith(COLLECTIVES))
        )
        boundaries = {*self.stages.starts, *self.labels[self.main].starts}
        boundaries |= {*innermost.starts, *sent.starts}
        times, calls = Counter[str](), Counter[str]()
        for event in mine:
            if any(start <= event.start < end for start, end in self.windows):
                calls[event.name] += 1
        for begin, finish in _segments(boundaries, self.windows):
            owner, name = self.owner(self.main, begin), innermost.at(begin)
            if name:
                times[name] += finish - begin
            elif owner[0] not in (DATA, COMMUNICATION):
                waits = bool(sent.at(begin))
                owner = (COMMUNICATION, COMMUNICATION) if waits else (IDLE, owner[0])
                if not waits:
                    division.gaps.append(finish - begin)
            division.nanoseconds[owner] += finish - begin
        division.top = {name: (time, calls[name]) for name, time in times.most_common()}
        return division

    def _divide_gpu(self) -> Division:
        division = Division(len(self.windows))
        launchers = {event.id: event for event in self.host if event.id}
        kernels: list[tuple[int, Event, tuple[str, str]]] = []
        times, calls = Counter[str](), Counter[str]()
        for kernel in self.kernels:
            launcher = launchers.get(kernel.launcher)
            if launcher is not None:
                owner = self.owner(launcher.thread, launcher.start)
            else:  # launched outside every operation of torch: all that is known is when it ran
                owner = self.stages.at(kernel.start) or OPTIMIZER, UNKNOWN
            # who computes has the time: a collective or a copy beside it costs the step nothing
            rank = 0
            if kernel.name.startswith(COLLECTIVES):
                owner, rank = (COMMUNICATION, COMMUNICATION), 1
            elif kernel.name.startswith(COPIES):
                rank = 2
            kernels.append((rank, kernel, owner))
            if any(start <= kernel.start < end for start, end in self.windows):
                times[kernel.name] += kernel.end - kernel.start
                calls[kernel.name] += 1
        for begin, finish, found in _sweep(kernels, self.windows, self.stages.starts):
            if found is None:
                stage = self.stages.at(begin)
                found = (DATA, OTHER) if stage == DATA else (IDLE, stage)
                if stage != DATA:
                    division.gaps.append(finish - begin)
            division.nanoseconds[found] += finish - begin
        division.top = {name: (time, calls[name]) for name, time in times.most_common()}
        return division


def _union(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int, str]]:
    """Disjoint intervals that cover the same."""
    merged: list[tuple[int, int, str]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), "yes")
        else:
            merged.append((start, end, "yes"))
    return merged


def _segments(
    boundaries: Iterable[int], windows: Iterable[tuple[int, int]]
) -> Iterable[tuple[int, int]]:
    """The windows, cut at every boundary."""
    points = sorted(boundaries)
    for start, end in windows:
        inner = points[bisect_right(points, start) : bisect_right(points, end - 1)]
        edges = [start, *dict.fromkeys(inner), end]
        yield from pairwise(edges)


def _sweep(
    kernels: Sequence[tuple[int, Event, tuple[str, str]]],
    windows: Sequence[tuple[int, int]],
    boundaries: Iterable[int],
) -> Iterable[tuple[int, int, tuple[str, str] | None]]:
    """(begin, end, owner) of the windows; of several kernels at once the one of least rank has the
    time, then the one that began first; None where there is none."""
    order = sorted(kernels, key=lambda item: item[1].start)
    points = {*boundaries, *(t for _, k, _ in order for t in (k.start, k.end))}
    running: list[tuple[int, int, int, tuple[str, str]]] = []  # rank, start, end, owner
    upcoming = 0
    for begin, finish in _segments(points, windows):
        while upcoming < len(order) and order[upcoming][1].start <= begin:
            rank, kernel, owner = order[upcoming]
            heapq.heappush(running, (rank, kernel.start, kernel.end, owner))
            upcoming += 1
        while running and running[0][2] <= begin:
            heapq.heappop(running)
        yield begin, finish, running[0][3] if running else None
