"""Forecasts of kernels beside what was measured of them.

python -m bench.forecasts bench/results/h200

A line for each Triton implementation that was timed, forward and backward: the forecast of its
compiled code on that GPU, the measurement, and their ratio. More than 15 % apart is marked: either
the kernel hides less than it could, or a constant of nanochat/kernels/forecast.py is wrong.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from bench.contenders import OURS, TIMED
from bench.rows import Row, load
from nanochat.kernels import aot
from nanochat.kernels.forecast import MACHINES, forecast_op
from nanochat.kernels.registry import operations
from nanochat.kernels.workloads import WORKLOADS
from nanochat.report import table

HEADS = ("operation", "size", "implementation", "forecast, ms", "measured, ms", "ratio", "")
APART = 0.15


def comparable(rows: Iterable[Row]) -> list[Row]:
    """Rows of our Triton kernels in bfloat16, over all passes, on a GPU that has a forecast."""
    return [
        row
        for row in rows
        if row["kind"] == "kernel" and row["status"] == TIMED and row["role"] == OURS
        if row["whole"] and row["dtype"] == "bfloat16" and row["workload"] in WORKLOADS
        if row["contender"] in operations()[row["op"]].triton_names() and target_of(row["gpu"])
    ]  # fmt: skip


def target_of(gpu: str) -> str:
    """The machine of forecasts that a device name means, or ""."""
    return next((target for target, machine in MACHINES.items() if machine.name in gpu), "")


def lines(rows: Iterable[Row]) -> list[list[object]]:
    """The cells of the table."""
    found: list[list[object]] = []
    for row in comparable(rows):
        op, workload = operations()[row["op"]], WORKLOADS[row["workload"]]
        expected = forecast_op(op, row["contender"], target_of(row["gpu"]), workload).seconds
        ratio = row["seconds"] / expected
        note = "" if abs(ratio - 1) <= APART else f"more than {APART:.0%} apart"
        times = 1e3 * expected, 1e3 * row["seconds"], ratio
        found.append([op.name, workload.name, row["contender"], *times, note])
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench.forecasts", description=__doc__)
    parser.add_argument("rows", type=Path, help="a file or folder of rows that bench wrote")
    args = parser.parse_args(argv)
    aot.require_compiler(parser.prog)
    print(table(HEADS, lines(load(args.rows))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
