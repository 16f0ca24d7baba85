"""Hands times measured elsewhere to pytest-benchmark, whose own clock sees the host only."""

from collections.abc import Sequence

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import OURS
from bench.rows import REFUSED, TIMED, UNSAVED, Row


class Replay:
    """A clock that advances by the next sample between two readings: start, stop, start, ..."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.now = 0.0
        self.running = False

    def __call__(self) -> float:
        if self.running:
            self.now += self.samples.pop(0)
        self.running = not self.running
        return self.now


def report(row: Row, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    """Give a row's samples and fields to the plugin.

    What was not timed is skipped with the reason; an implementation of ours that is wrong fails.
    """
    if row["status"] != TIMED:
        reason = f"{row['contender']} {row['status']}: {row['reason']}"
        if row["status"] == REFUSED and row.get("role") == OURS:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    marker = request.node.get_closest_marker("benchmark")
    assert marker is not None
    samples: Sequence[float] = row[UNSAVED]
    marker.kwargs["timer"].samples = list(samples)
    benchmark.extra_info.update({key: row[key] for key in row if key != UNSAVED})
    benchmark.pedantic(lambda: None, rounds=len(samples))
