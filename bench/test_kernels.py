"""Every operation against eager, torch.compile and the peers; see bench/kernels.py for the rules.

pytest bench/test_kernels.py --ops=rms_norm,relu2_mlp --workloads=d12,d20
"""

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import FAILURES, first_line, make_case, names
from bench.kernels import PASSES, kernel_rows
from bench.rows import Replay, Row, Session, replay
from nanochat.kernels.registry import Op, operations
from nanochat.kernels.workloads import WORKLOADS, Workload

# Enough to see it work where there is no GPU; its times say nothing about one.
SMALL = Workload("cpu-small", 1, 256, tokens=256, vocab_size=1024)


def workloads(wanted: str) -> list[Workload]:
    """Those named; all on a GPU; without one, the small one."""
    known = WORKLOADS | {SMALL.name: SMALL}
    default = ",".join(WORKLOADS) if torch.cuda.is_available() else SMALL.name
    return [known[name] for name in (wanted or default).split(",")]


@functools.cache
def passes(op: Op) -> tuple[str, ...]:
    """All, or forward alone for an operation without a gradient."""
    case = make_case(op, SMALL, torch.device("meta"), torch.float32)
    return tuple(PASSES) if case.leaves else ("forward",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    wanted = [name for name in config.getoption("--ops").split(",") if name]
    chosen = [operations()[name] for name in wanted] or list(operations().values())
    metafunc.parametrize(
        ("op", "workload", "pass_name", "contender"),
        [
            pytest.param(
                op,
                workload,
                name,
                contender,
                id=f"{op.name}-{workload.name}-{name}-{contender}",
                marks=pytest.mark.benchmark(
                    group=f"{op.name} {workload.name} {name}", timer=Replay()
                ),
            )
            for op in chosen
            for workload in workloads(config.getoption("--workloads"))
            for name in passes(op)
            for contender in names(op)
        ],
    )


@pytest.fixture(scope="module")
def measured(bench: Session):
    """Rows of an operation at a size, or why there are none; measured when first asked for."""

    @functools.cache
    def rows_of(op: Op, workload: Workload) -> dict[tuple[str, str], Row] | str:
        try:
            rows = kernel_rows(op, workload, bench)
        except FAILURES as error:  # kept like a result: every pass would fail alike
            return first_line(error)
        bench.keep("kernels.json", rows)
        return {(row["pass"], row["contender"]): row for row in rows}

    return rows_of


def test_kernel(
    op: Op,
    workload: Workload,
    pass_name: str,
    contender: str,
    measured,
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    rows = measured(op, workload)
    if isinstance(rows, str):
        pytest.fail(f"{op.name} {workload.name}: {rows}", pytrace=False)
    replay(rows[pass_name, contender], benchmark, request)
