"""The optimizer step of whole models under different kernels; see bench/train_steps.py.

pytest bench/test_train_step.py --workloads=d12
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.session import Session, chosen, replay, replayed
from bench.train_steps import (
    SIZES,
    SMALL_SIZE,
    Size,
    compiled_variants,
    eager_variants,
    measured,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups = [eager_variants]
    if torch.cuda.is_available():  # compiling a whole model for a CPU takes longer than it tells
        groups.append(compiled_variants)
    metafunc.parametrize(
        ("size", "variants", "variant"),
        [
            replayed(f"train step {size.name}", size, variants, variant.name)
            for size in chosen(metafunc.config.getoption("--workloads"), SIZES, SMALL_SIZE)
            for variants in groups
            for variant in variants()
        ],
    )


def test_train_step(
    size: Size,
    variants,
    variant: str,
    bench: Session,
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    name = f"{size.name} {variants.__name__}"
    rows = bench.once(name, "train_step.json", lambda: measured(size, bench, variants()))
    replay(rows["step", variant], benchmark, request)
