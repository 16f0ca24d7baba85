"""Measure kernel configurations on this GPU and write the fastest into its table.

    python -m bench.tune [--op rms_norm relu2_mlp] [--workloads d12 d20 d32] [--seconds 30]

For each `Config` of nanochat/kernels and each size the workloads ask of it: the shipped
configuration and its neighbours, nearest first, until the seconds of that kernel and size are
spent. A candidate counts if it compiles and passes the check of bench/contenders.py. The fastest
must also pass the gate of nanochat/kernels/aot.py, then beat the shipped one once more, turn by
turn. Shipped entries stay after the measured ones, for other dtypes and larger sizes.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.configurations import Entry, Use, candidates, record, trial, uses, write_entry
from bench.contenders import FAILURES, Case, check_case, first_line, make_case, refusal
from bench.measure import Stage, Timer, interleave, timer_for
from nanochat import command
from nanochat.common import setup_training
from nanochat.kernels import aot
from nanochat.kernels.launch import CONFIGS, architecture_of
from nanochat.kernels.registry import Op, operations
from nanochat.kernels.workloads import WORKLOADS, Workload

CANDIDATE_SECONDS, DUEL_SECONDS = 0.1, 0.5
MARGIN = 0.02  # share of the shipped configuration's time that a winner must save


@dataclass(frozen=True)
class Task:
    """A kernel at one size, and the call that is timed to tune it."""

    use: Use
    op: Op
    implementation: str
    workload: Workload

    @property
    def call(self) -> Callable[..., Any]:
        """The implementation."""
        return self.op.implementations[self.implementation].call

    @property
    def passes(self) -> int:
        """How many of forward and backward are timed: the second if the kernel runs only there."""
        return 1 if self.use.forward else 2

    @property
    def what(self) -> str:
        """Description of the timed call."""
        passes = "forward" if self.use.forward else "forward and backward"
        return f"{self.op.name} {self.workload.name} {passes}"


def tasks(
    ops: Sequence[Op], workloads: Sequence[Workload], architecture: str, dtype: torch.dtype
) -> list[Task]:
    """A task for each kernel and size with a choice: timed in the forward pass where it runs
    there, inside the operation that moves most bytes."""
    found: dict[tuple[str, int, int], list[tuple[bool, float, Task]]] = {}
    for op, workload in itertools.product(ops, workloads):
        moved = op.cost(*op.workload(workload, torch.device("meta"), dtype)).bytes
        for name in reversed(op.triton_names()):  # the one `auto` prefers first
            for use in uses(op, name, workload, architecture, dtype):
                if len(candidates(use.entry)) > 1:
                    key = use.config.kernel, use.size, use.element_size
                    task = Task(use, op, name, workload)
                    found.setdefault(key, []).append((use.forward, moved, task))
    return [max(users, key=lambda user: user[:2])[2] for users in found.values()]


class Tuner:
    """Measures candidates on one device. `log` has every one of them, with what came of it."""

    def __init__(
        self, architecture: str, device: torch.device, dtype: torch.dtype, timer: Timer
    ) -> None:
        self.architecture, self.device, self.dtype = architecture, device, dtype
        self.timer = timer
        self.log: list[dict[str, Any]] = []

    def tune(self, task: Task, seconds: float) -> Entry | None:
        """The new entry of the table, or None if the shipped configuration stays."""
        deadline = time.perf_counter() + seconds
        torch.manual_seed(0)
        case = make_case(task.op, task.workload, self.device, self.dtype)
        small = check_case(task.op, task.workload, self.device, self.dtype)
        eager, exact = small.results(task.op.reference), small.exact().results(task.op.reference)
        times: list[tuple[float, int, Entry]] = []
        for index, entry in enumerate(candidates(task.use.entry)):
            if index and time.perf_counter() > deadline:
                break
            try:
                with trial(self.architecture, task.use.config, entry):
                    result = refusal(small.results(task.call), eager, exact)
                if not result:
                    seconds_of = self.medians(task, case, {"": entry}, CANDIDATE_SECONDS)[""]
                    times.append((seconds_of, index, entry))
                    result = f"{1e6 * seconds_of:.1f} us"
            except FAILURES as error:
                result = first_line(error)
            self.note(task, entry, result)
        for _, index, entry in sorted(times, key=lambda found: found[:2]):
            if index == 0:  # the shipped one
                return None
            faults = self.faults(task, entry)
            if faults:
                self.note(task, entry, faults)
                continue
            duel = {"shipped": task.use.entry, "new": entry}
            if times[0][1]:  # the shipped one cannot run here
                del duel["shipped"]
            won = self.medians(task, case, duel, DUEL_SECONDS)
            before, after = won.get("shipped", float("inf")), won["new"]
            self.note(task, entry, f"{1e6 * after:.1f} us, {1e6 * before:.1f} us before")
            return self.entry(task, entry, after, before) if after < (1 - MARGIN) * before else None
        return None

    def medians(
        self, task: Task, case: Case, entries: dict[str, Entry], seconds: float
    ) -> dict[str, float]:
        """Seconds of the task's passes under each entry, measured turn by turn."""

        def under(entry: Entry, stage: Stage) -> Stage:
            def run(value: Any) -> Any:
                with trial(self.architecture, task.use.config, entry):
                    return stage(value)

            return run

        stages = case.stages(task.call)[: task.passes]
        contenders = {
            name: [under(entry, stage) for stage in stages] for name, entry in entries.items()
        }
        samples = interleave(contenders, self.timer, seconds)
        return {
            name: median([sum(parts) for parts in zip(*of_stages, strict=True)])
            for name, of_stages in samples.items()
        }

    def faults(self, task: Task, entry: Entry) -> str:
        """What the ahead-of-time gate holds against an entry; "" where it knows no such GPU."""
        if self.architecture not in aot.TARGETS:
            return ""
        call = task.op, task.implementation, task.workload, self.architecture
        with trial(self.architecture, task.use.config, entry):
            recorder, _ = record(*call, self.dtype)
        recorded = aot.Call(task.op.name, str(self.dtype), task.workload.name, recorder.launches)
        rows = aot.gate([recorded], self.architecture)
        return "; ".join(dict.fromkeys(row.faults for row in rows if row.faults))

    def entry(self, task: Task, entry: Entry, after: float, before: float) -> Entry:
        """The entry as the table holds it."""
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "a CPU"
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        origin = f"measured on {where}, {date}: {1e6 * after:.1f} us for {task.what}"
        if before < float("inf"):
            origin += f", {1e6 * before:.1f} us before"
        covers = {"up_to": task.use.size, "element_size": task.use.element_size}
        return covers | entry | {"origin": origin}

    def note(self, task: Task, entry: Entry, result: str) -> None:
        """Add to the log."""
        call = {"kernel": task.use.config.kernel, "size": task.use.size, "call": task.what}
        self.log.append(call | {"entry": entry, "result": result})


LOG = "tune_log.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__)
    parser.add_argument("--op", nargs="*", choices=operations(), default=[], help="all")
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--seconds", type=float, default=30.0, help="for each kernel and size")
    parser.add_argument("--output", type=Path, default=CONFIGS, help="folder of the table")
    parser.add_argument("--log", type=Path, help=f"folder of {LOG}; none is written without it")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.tune measures on a GPU, and torch finds none on this machine")
    runtime = setup_training("cuda")
    device, dtype = runtime.device, runtime.dtype
    tuner = Tuner(architecture_of(device), device, dtype, timer_for(device))
    ops = [operations()[name] for name in arguments.op or operations()]
    workloads = [WORKLOADS[name] for name in arguments.workloads]
    major, minor = torch.cuda.get_device_capability(device)
    for task in tasks(ops, workloads, tuner.architecture, dtype):
        kernel = task.use.config.kernel
        entry = tuner.tune(task, arguments.seconds)
        print(
            f"{kernel} {task.use.size}: {entry['origin'] if entry else 'as it was'}",
            flush=True,
        )
        if entry:
            write_entry(arguments.output, f"sm_{major}{minor}", kernel, entry)
        if arguments.log:
            (arguments.log / LOG).write_text(json.dumps(tuner.log, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
