"""Programs a second in the sandbox, on one core and on all: warm workers against new interpreters.

    pytest bench/test_sandbox.py                          half a minute
    pytest bench/test_sandbox.py --out=bench/results/cpu  and write sandbox.json there

Each contender runs the same function and test, over and over; on n cores n threads ask for runs,
and the process may use n cores only. Programs a second a core is the rate over the cores, of a run
with its namespaces, its barriers and its cleaning up; programs a CPU second hold on a busy machine.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.session import machine
from nanochat.sandbox.execution import Sandbox
from nanochat.sandbox.workers import BUBBLEWRAP_ONCE, Limits, ways_outside

FUNCTION = "def total(numbers):\n    return sum(numbers)"
TEST = "for n in range(20):\n    assert total(list(range(n))) == n * (n - 1) // 2"
PROGRAM = f"{FUNCTION}\n{TEST}"
LIMITS = Limits()
NEW = "new interpreter, no barriers"
SECONDS = 2.0
CORES = sorted({1, len(os.sched_getaffinity(0))})
ROUNDS = 3
Row = dict[str, Any]


def new_interpreter() -> bool:
    command = [os.path.realpath(sys.executable), "-I", "-c", PROGRAM]
    return subprocess.run(command, env={}).returncode == 0


def contenders() -> Iterator[tuple[str, str]]:
    """(what runs a program, way outside or "")."""
    yield NEW, ""
    for way in ways_outside():
        yield f"execute, {way}", way
        yield f"judge, {way}", way


@contextmanager
def open_contender(name: str, way: str) -> Iterator[Callable[[], bool]]:
    if name == NEW:
        yield new_interpreter
        return
    with Sandbox(allow_weaker_sandbox=True) as sandbox:
        sandbox.way = way
        if name.startswith("execute"):
            yield lambda: sandbox.execute(PROGRAM, LIMITS).success
        else:
            yield lambda: sandbox.judge(FUNCTION, TEST, "total", LIMITS).success


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """This process, and those it starts, on the first `count` cores."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(mine)[:count])
    yield
    os.sched_setaffinity(0, mine)


def cpu_seconds() -> float:
    """Of this process and all it started, those that have ended and were waited for included."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in [me, *me.children(recursive=True)])


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return []


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize(("name", "way"), list(contenders()), ids=[n for n, _ in contenders()])
def test_contender(
    name: str, way: str, cores: int, rows: list[Row], benchmark: BenchmarkFixture
) -> None:
    counts: list[int] = []
    seconds = SECONDS / (4 if way == BUBBLEWRAP_ONCE else 1)

    def rate(run: Callable[[], bool]) -> None:
        end = time.perf_counter() + seconds

        def repeat() -> int:
            count = 0
            while time.perf_counter() < end:
                assert run()
                count += 1
            return count

        with ThreadPoolExecutor(cores) as pool:
            counts.append(sum(f.result() for f in [pool.submit(repeat) for _ in range(cores)]))

    with on_cores(cores), open_contender(name, way) as run:
        # the first runs start the workers, one for each thread
        with ThreadPoolExecutor(cores) as pool:
            assert all(pool.map(lambda _: run(), range(2 * cores)))
        spent = -cpu_seconds()
        benchmark.pedantic(rate, args=(run,), rounds=ROUNDS)
        spent += cpu_seconds()
    rates = sorted(count / seconds / cores for count in counts)
    row: Row = {"name": name, "cores": cores, "programs_per_s_per_core": rates[len(rates) // 2]}
    row |= {"slowest": rates[0], "fastest": rates[-1]}
    # workers that end with their program take what they spent along
    if way != BUBBLEWRAP_ONCE:
        row["programs_per_cpu_s"] = sum(counts) / spent
    rows.append(row)


def test_results(
    rows: list[Row], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table, and the rows of a file."""
    head = f"{'':44}{'cores':>7}{'programs/s/core':>17}{'slowest':>9}{'fastest':>9}"
    lines = ["", f"{head}{'programs/CPU s':>16}"]
    for row in rows:
        rates = f"{row['programs_per_s_per_core']:17.1f}{row['slowest']:9.1f}{row['fastest']:9.1f}"
        each_cpu_s = row.get("programs_per_cpu_s", float("nan"))
        lines.append(f"{row['name']:44}{row['cores']:7}{rates}{each_cpu_s:16.1f}")
    with capsys.disabled():
        print("\n".join(lines))
    out = request.config.getoption("--out")
    if out is not None:
        known = machine(torch.device("cpu"), request.config.getoption("--commit"))
        known |= {"cpu_count": os.cpu_count(), "load": os.getloadavg(), "seconds": SECONDS}
        out.mkdir(parents=True, exist_ok=True)
        (out / "sandbox.json").write_text(json.dumps({**known, "rows": rows}, indent=1) + "\n")
