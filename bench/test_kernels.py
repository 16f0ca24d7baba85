"""Every operation against eager, torch.compile and the peers; see bench/kernels.py for the rules.

pytest bench/test_kernels.py --ops=rms_norm,relu2_mlp --workloads=d12,d20
"""

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import names
from bench.kernels import kernel_rows
from bench.session import SMALL, Session, chosen, replay, replayed
from nanochat.kernels.registry import Op, operations
from nanochat.kernels.workloads import WORKLOADS, Workload

# Enough to see it work where there is no GPU; its times say nothing about one.
SMALL_WORKLOAD = Workload(SMALL, 1, 256, tokens=256, vocab_size=1024)


@functools.cache
def passes(op: Op) -> tuple[str, ...]:
    """All, or forward alone for an operation without a gradient."""
    arguments = op.workload(SMALL_WORKLOAD, torch.device("meta"), torch.float32)
    return tuple(op.cost(*arguments).passes())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ops, workloads = (metafunc.config.getoption(flag) for flag in ("--ops", "--workloads"))
    metafunc.parametrize(
        ("op", "workload", "pass_name", "contender"),
        [
            replayed(f"{op.name} {workload.name} {name}", op, workload, name, contender)
            for op in operations().values()
            if not ops or op.name in ops.split(",")
            for workload in chosen(workloads, WORKLOADS, SMALL_WORKLOAD)
            for name in passes(op)
            for contender in names(op)
        ],
    )


def test_kernel(
    op: Op,
    workload: Workload,
    pass_name: str,
    contender: str,
    bench: Session,
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    name = f"{op.name} {workload.name}"
    rows = bench.once(name, "kernels.json", lambda: kernel_rows(op, workload, bench))
    replay(rows[pass_name, contender], benchmark, request)
