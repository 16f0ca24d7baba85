"""Run untrusted Python programs, such as the answers of a model, where they can do no harm.

    execute(program)                one text: what it printed and how it ended
    judge(candidate, test, name)    whether a function that an untrusted text defines passes a test

Programs run in forked children of warm workers, which start with the first program and end with
this process. Everything around a program is in docs/sandbox.md: which barriers there are, what each
of them stops, and what is left where a kernel does not grant one.

`execute` tells how a program ended as the program itself tells it: it is for texts that have
nothing to gain from lying. A verdict on untrusted code comes from `judge`, which runs the test in a
process of its own; the candidate's process receives arguments and returns plain values, and holds
nothing that could say "passed".

>>> judge("def double(x):\\n    return 2 * x", "assert double(4) == 8", "double").success
True
>>> judge("import os\\nos._exit(0)", "assert double(4) == 8", "double").error
'left before its last line'
"""

import atexit
import contextlib
import functools
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.sandbox.confinement import BARRIERS, SCRATCH
from nanochat.sandbox.workers import (
    Job,
    Limits,
    LostWorkerError,
    Worker,
    remove_tree,
    ways_outside,
)

GONE = "CandidateGoneError"


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program.

    success    it ran to its last line; exiting earlier, with any exit code, is not a success.
    error      last line of its traceback, or what ended it; "" where it succeeded.
    isolation  the barriers that held, of confinement.BARRIERS
    missing    those that this kernel did not grant
    """

    success: bool
    stdout: str
    stderr: str
    error: str
    timed_out: bool
    memory_exceeded: bool
    isolation: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """The barriers that this kernel did not grant."""
        return tuple(name for name in BARRIERS if name not in self.isolation)


class Sandbox:
    """Warm workers, as many as programs run at a time; any thread may use it.

    allow_weaker_sandbox  run programs even where a barrier is missing
    """

    def __init__(self, allow_weaker_sandbox: bool = False) -> None:
        self.allow_weaker_sandbox = allow_weaker_sandbox
        self.required = () if allow_weaker_sandbox else BARRIERS
        self.lock = threading.Lock()
        self.idle: list[Worker] = []
        self.way = ""
        self.isolation: tuple[str, ...] = ()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers that are not at work."""
        with self.lock:
            while self.idle:
                self.idle.pop().close()

    def ready(self) -> "Sandbox":
        """Start the first worker, in the strongest way there is.

        Raises  ValueError where this kernel lacks a barrier and a weaker sandbox was not allowed.
        """
        with self.lock:
            if not self.way:
                self.way, self.isolation = strongest_way(ways())
            missing = [name for name in BARRIERS if name not in self.isolation]
        if missing and not self.allow_weaker_sandbox:
            raise ValueError(
                f"this kernel does not grant {' and '.join(missing)}, so a program could reach "
                "more than it should (python -m nanochat.sandbox.check says why); run where "
                "everything is granted, or accept the danger with --allow_weaker_sandbox"
            )
        return self

    def execute(self, program: str, limits: Limits) -> ExecutionResult:
        """Run a program to its end or its limits; see the function `execute`."""
        self.ready()
        job = Job("program", program, limits, self.required)
        self._run(job)
        return _result(job, job, limits)

    def judge(self, candidate: str, test: str, function: str, limits: Limits) -> ExecutionResult:
        """Run a test on a candidate's function; see the function `judge`."""
        self.ready()
        ends = socket.socketpair()
        called, calling = (
            Job(role, text, limits, self.required, function, end.fileno())
            for role, text, end in (("candidate", candidate, ends[0]), ("tester", test, ends[1]))
        )
        self._run(called, calling, ends=ends)
        return _result(called, calling, limits)

    def _run(self, *jobs: Job, ends: tuple[socket.socket, ...] = ()) -> None:
        """Each job on a worker of its own, at the same time; a lost worker is not used again."""
        with contextlib.ExitStack() as stack:
            started = []
            try:
                for job in jobs:
                    worker = self._take()
                    stack.callback(self._give_back, worker)
                    scratch = SCRATCH
                    if not worker.has_root:
                        scratch = stack.enter_context(_scratch_folder())
                    started.append((worker, job, worker.start(job, scratch)))
            except LostWorkerError as error:
                jobs[-1].outcome = {"lost": str(error)}
            finally:
                # workers have their copies: a channel ends when its programs do
                for end in ends:
                    end.close()
            for worker, job, outputs in reversed(started):
                try:
                    worker.finish(job, outputs)
                except LostWorkerError as error:
                    job.outcome = {"lost": str(error)}
                    worker.close()

    def _take(self) -> Worker:
        with self.lock:
            while self.idle:
                worker = self.idle.pop()
                if worker.owner == os.getpid() and worker.process.poll() is None:
                    return worker
                worker.close()
        return Worker(self.way)

    def _give_back(self, worker: Worker) -> None:
        if worker.once:
            worker.close()
        elif worker.socket.fileno() >= 0:
            with self.lock:
                self.idle.append(worker)


def ways() -> dict[str, Job]:
    """The ways that a worker can get its namespaces here, as far as the first that gets them all,
    and an empty program that was run in each."""
    tried: dict[str, Job] = {}
    for way in ways_outside():
        sandbox = Sandbox(allow_weaker_sandbox=True)
        sandbox.way = way
        tried[way] = Job("program", "", Limits(timeout_s=30), ())
        with sandbox:
            sandbox._run(tried[way])
        if len(tried[way].held) == len(BARRIERS):
            break
    return tried


def strongest_way(tried: dict[str, Job]) -> tuple[str, tuple[str, ...]]:
    """The first of the ways in which most barriers hold, and which they are.

    Raises  ValueError where no program ran, as on a system that is not Linux.
    """
    found = {way: job.held for way, job in tried.items() if job.outcome.get("finished")}
    if not found:
        said = "; ".join(job.outcome.get("lost", job.last_line) for job in tried.values())
        raise ValueError(
            f"the sandbox does not start here ({said or sys.platform}): it needs Linux 5.13 or "
            "later on x86_64 or aarch64; leave out the tasks whose answers are programs"
        )
    way = max(found, key=lambda name: len(found[name]))
    return way, found[way]


@contextlib.contextmanager
def _scratch_folder() -> Iterator[str]:
    """A folder for a program, where there is no mount namespace."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-sandbox-"))
    scratch = folder / "scratch"
    scratch.mkdir()
    try:
        yield str(scratch)
    finally:
        # what a missing barrier let live may still write there
        with contextlib.suppress(OSError):
            remove_tree(folder)


def _result(candidate: Job, judged: Job, limits: Limits) -> ExecutionResult:
    """What is known of a run; `judged` is the job whose end is the verdict."""
    jobs = [judged] if candidate is judged else [candidate, judged]
    success = bool(judged.outcome.get("finished") and not judged.outcome["timed_out"])
    timed_out = any(job.outcome.get("timed_out") for job in jobs) and not success
    # a test that got no answer ends for a reason that the candidate's end tells
    blamed = judged
    if not success and candidate is not judged and GONE in judged.last_line:
        blamed = candidate
    return ExecutionResult(
        success=success,
        stdout="".join(job.stdout for job in jobs),
        stderr="".join(job.stderr for job in jobs),
        error="" if success else _reason(blamed, timed_out, limits.timeout_s),
        timed_out=timed_out,
        memory_exceeded=not success
        and any(job.last_line.startswith("MemoryError") for job in jobs),
        isolation=tuple(name for name in BARRIERS if all(name in job.held for job in jobs)),
    )


def _reason(job: Job, timed_out: bool, timeout_s: float) -> str:
    if timed_out:
        return f"stopped after {timeout_s:g} s"
    if not job.outcome or "lost" in job.outcome:
        return f"the sandbox lost it: {job.outcome.get('lost', 'not started')}"
    status = job.outcome["status"]
    if status < 0:
        known = -status in {number.value for number in signal.Signals}
        return f"ended by {signal.Signals(-status).name if known else f'signal {-status}'}"
    if status:
        return job.last_line or f"exit code {status}"
    return "left before its last line"


@functools.cache
def shared_sandbox(allow_weaker_sandbox: bool) -> Sandbox:
    """The sandbox of this process, whose workers end with it."""
    sandbox = Sandbox(allow_weaker_sandbox)
    atexit.register(sandbox.close)
    return sandbox


@functools.cache
def isolation_level() -> tuple[str, ...]:
    """The barriers that programs get here, of confinement.BARRIERS; () where none can run."""
    try:
        return strongest_way(ways())[1]
    except ValueError:
        return ()


def execute(
    program: str,
    *,
    timeout_s: float = 5.0,
    memory_bytes: int = 256 << 20,
    allow_weaker_sandbox: bool = False,
) -> ExecutionResult:
    """Run `program` to its end or its limits; there is a result for every program.

    timeout_s     wall time; the CPU gets a second more.
    memory_bytes  address space of the interpreter, which takes about 25 MiB itself.
    Raises        ValueError for a limit that is not positive, or where the kernel lacks a barrier
                  and allow_weaker_sandbox is not given.
    """
    limits = Limits(timeout_s, memory_bytes)
    return shared_sandbox(allow_weaker_sandbox).execute(program, limits)


def judge(
    candidate: str,
    test: str,
    function: str,
    *,
    timeout_s: float = 5.0,
    memory_bytes: int = 256 << 20,
    allow_weaker_sandbox: bool = False,
) -> ExecutionResult:
    """Run `test`, which calls `function` by its name, on the function that `candidate` defines.

    The test has succeeded if it ran to its last line. Arguments and results are plain values:
    numbers, strings, bytes, None, and lists, tuples, dicts, sets of them; iterators arrive as
    iterators, exceptions as the built-in one of the same name. What the function does to a list,
    dict or set among its arguments, the test sees.

    timeout_s, memory_bytes  as in `execute`, for each of the two processes.
    Raises                   ValueError as `execute`.
    """
    limits = Limits(timeout_s, memory_bytes)
    return shared_sandbox(allow_weaker_sandbox).judge(candidate, test, function, limits)
