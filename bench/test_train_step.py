"""The optimizer step of whole models under different kernels; see bench/train_steps.py.

pytest bench/test_train_step.py --workloads=d12
"""

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import FAILURES, first_line
from bench.rows import Replay, Row, Session, replay
from bench.train_steps import SIZES, SMALL, Size, compiled_variants, eager_variants, measured

Measured = Callable[[Size, bool], dict[str, Row] | str]


def sizes(wanted: str) -> list[Size]:
    """Those named; all on a GPU; without one, the small one."""
    if not wanted:
        return list(SIZES.values()) if torch.cuda.is_available() else [SMALL]
    known = SIZES | {SMALL.name: SMALL}
    return [known[name] for name in wanted.split(",") if name in known]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups = [(False, eager_variants())]
    if torch.cuda.is_available():  # compiling a whole model for a CPU takes longer than it tells
        groups.append((True, compiled_variants()))
    metafunc.parametrize(
        ("size", "compiled", "variant"),
        [
            pytest.param(
                size,
                compiled,
                variant.name,
                id=f"{size.name}-{variant.name}",
                marks=pytest.mark.benchmark(group=f"train step {size.name}", timer=Replay()),
            )
            for size in sizes(metafunc.config.getoption("--workloads"))
            for compiled, variants in groups
            for variant in variants
        ],
    )


@pytest.fixture(scope="module")
def steps(bench: Session) -> Measured:
    """Rows by variant of a size, or why there are none; measured when first asked for."""

    @functools.cache
    def rows_of(size: Size, compiled: bool) -> dict[str, Row] | str:
        variants = compiled_variants() if compiled else eager_variants()
        try:
            return {row["contender"]: row for row in measured(size, bench, variants)}
        except FAILURES as error:  # kept like a result: every variant would fail the same way
            return first_line(error)

    return rows_of


def test_train_step(
    size: Size,
    compiled: bool,
    variant: str,
    steps: Measured,
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    rows = steps(size, compiled)
    if isinstance(rows, str):
        pytest.fail(f"{size.name}: {rows}", pytrace=False)
    replay(rows[variant], benchmark, request)
