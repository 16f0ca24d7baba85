"""The toggle matrix: what each kernel is worth in a training step, alone and among the others.

    all off            every operation by reference
    op=implementation  that one alone, on top of the references
    all on             what --kernels=auto chooses
    all on, no op      that one by reference, the others as chosen
    compile            the references under torch.compile; and "all on, compile"

A kernel that is faster alone may be worth nothing among the others, whose work hides or removes its
own: both rows are needed. Losses are those after the same steps from the same weights; times are
taken turn by turn in another order each round, so that a clock that falls meets everyone alike.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from nanochat.kernels.registry import Op, operations, probe
from nanochat.profiler.breakdown import Table

OFF, ON, REFERENCE = "all off", "all on", "reference"
UNTIMED, TIMED = 1, 2  # steps of a turn: the first one settles allocator and caches
LOSS_STEPS = 3  # after which losses are compared, each from the same weights


class Subject(Protocol):
    """What is trained."""

    def reset(self) -> None:
        """Back to the weights and the optimizer state of the start."""
        ...

    def step(self, compiled: bool) -> tuple[float, float]:
        """(loss, seconds) of a training step on the batch of all."""
        ...

    def peak_bytes(self, compiled: bool) -> int | None:
        """Most memory in a step; None where it is not known."""
        ...


@dataclass
class Toggle:
    """A choice of kernels, and what was measured under it.

    loss  after LOSS_STEPS steps
    """

    name: str
    kernels: dict[str, str]
    compiled: bool = False
    loss: float = 0.0
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    def use(self) -> None:
        """Choose its kernels."""
        for op, implementation in self.kernels.items():
            operations()[op].use(implementation)


def called(step: Callable[[], object]) -> list[str]:
    """Operations that `step` calls."""
    found: dict[str, None] = {}

    def noting(op: Op) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrapper(call: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                found[op.name] = None
                return call(*args, **kwargs)

            return noted

        return wrapper

    with ExitStack() as stack:
        for op in operations().values():
            stack.enter_context(op.wrapped(noting(op)))
        step()
    return list(found)


def matrix(
    names: Iterable[str],
    chosen: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    no_compile: str,
) -> tuple[list[Toggle], dict[str, str]]:
    """Toggles of the operations of those names, and why others do not exist here.

    chosen      operation -> implementation that --kernels=auto takes
    no_compile  why torch.compile cannot run here, or ""
    """
    off = dict.fromkeys(names, REFERENCE)
    on = {name: chosen[name] for name in off}
    wanted = [Toggle(OFF, off)]
    absent: dict[str, str] = {}
    for name in off:
        op = operations()[name]
        for implementation in op.implementations.values():
            title = f"{name}={implementation.name}"
            if implementation.name == REFERENCE:
                continue
            reason = implementation.needs(device, dtype)
            if not reason and device.type != "cuda" and implementation.name in op.triton_names():
                reason = implementation.auto(device, dtype)
            elif not reason and device.type == "cuda":
                reason = probe(op, implementation, device, dtype)
            if reason:
                absent[title] = reason
            else:
                wanted.append(Toggle(title, off | {name: implementation.name}))
    wanted.append(Toggle(ON, on))
    wanted += [
        Toggle(f"{ON}, no {name}", on | {name: REFERENCE})
        for name, implementation in on.items()
        if implementation != REFERENCE
    ]
    if no_compile:
        absent["compile"] = no_compile
    else:
        wanted += [Toggle("compile", off, True), Toggle(f"{ON}, compile", on, True)]
    # with few kernels two names stand for one choice, which is measured once
    found: dict[Any, Toggle] = {}
    for toggle in wanted:
        same = found.setdefault((tuple(toggle.kernels.items()), toggle.compiled), toggle)
        if same is not toggle:
            same.name += f" = {toggle.name}"
    return list(found.values()), absent


def measure(toggles: Sequence[Toggle], subject: Subject, rounds: int) -> None:
    """Fill in loss, memory and times of every toggle; the subject ends where it began."""
    for toggle in toggles:
        toggle.use()
        subject.reset()
        for _ in range(LOSS_STEPS):
            toggle.loss, _ = subject.step(toggle.compiled)
        toggle.peak_bytes = subject.peak_bytes(toggle.compiled)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(toggles)
            for toggle in [*toggles[shift:], *toggles[:shift]]:
                toggle.use()
                steps = [subject.step(toggle.compiled)[1] for _ in range(UNTIMED + TIMED)]
                toggle.seconds += steps[UNTIMED:]
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    subject.reset()


def record(
    toggles: Sequence[Toggle], absent: Mapping[str, str], device_name: str, dtype: str
) -> dict[str, Any]:
    """What was measured, for the records; the first toggle is the one that others differ from."""
    base = toggles[0]
    rows = []
    for toggle in toggles:
        lower, median, upper = statistics.quantiles(toggle.seconds, n=4, method="inclusive")
        rows.append(
            {
                "name": toggle.name,
                "kernels": toggle.kernels,
                "compiled": toggle.compiled,
                "seconds": median,
                "lower_quartile": lower,
                "upper_quartile": upper,
                "steps": len(toggle.seconds),
                "peak_bytes": toggle.peak_bytes,
                "loss": toggle.loss,
                "loss_difference": toggle.loss - base.loss,
            }
        )
    return {"device_name": device_name, "dtype": dtype, "toggles": rows, "absent": dict(absent)}


def tables(record: Mapping[str, Any]) -> list[Table]:
    """The matrix, and what is not in it."""
    rows = record["toggles"]
    base = rows[0]["seconds"]
    lines = [
        (
            row["name"],
            f"{1e3 * row['seconds']:,.1f} ms",
            f"{1e3 * row['lower_quartile']:,.1f} to {1e3 * row['upper_quartile']:,.1f}",
            f"{base / row['seconds']:.2f} x",
            "not known" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f} MiB",
            f"{row['loss_difference']:+.1e}",
        )
        for row in rows
    ]
    steps = rows[0]["steps"]
    title = f"Toggle matrix: {record['device_name']}, {record['dtype']}, medians of {steps} steps"
    columns = ("kernels", "step", "quartiles", f"speed of {OFF}", "peak memory", "loss difference")
    found = [Table(title, columns, lines)]
    if record["absent"]:
        reasons = list(record["absent"].items())
        found.append(Table("Not possible here", ("kernels", "reason"), reasons, names=2))
    return found


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Bars of the step times with their quartiles, the first one's as a line."""
    # imported where a picture is drawn: it takes a second that no other command should pay
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = record["toggles"]
    figure = Figure(figsize=(8, 1 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    times = [1e3 * row["seconds"] for row in rows]
    below = [1e3 * (row["seconds"] - row["lower_quartile"]) for row in rows]
    above = [1e3 * (row["upper_quartile"] - row["seconds"]) for row in rows]
    colours = ["#999999" if row["compiled"] else "#3b76af" for row in rows]
    bars = axes.barh(range(len(rows)), times, xerr=[below, above], color=colours, capsize=3)
    axes.bar_label(bars, fmt="%.0f", padding=6, fontsize=8)
    axes.axvline(times[0], color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms a step, median and quartiles", title=record["device_name"])
    axes.title.set_fontsize(9)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=110)
