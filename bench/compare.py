"""Fail where B is slower than A: `python -m bench.compare A B`, each a rows file or a folder.

Only what is ours fails the comparison; eager, the compiler and the peers show how steady the
machine was. Rows of different GPUs are refused: their times say nothing about a change.
Exit status: 0 no loss, 1 a loss, 2 nothing to compare.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.contenders import MISSING, OURS, TIMED
from bench.rows import Row, identity, load
from nanochat.report import table

TOLERANCE = 0.05


def compare(
    before: Sequence[Row], after: Sequence[Row], tolerance: float
) -> tuple[list[list[object]], list[str]]:
    """Table rows (what, ms before, ms after, ratio) of all pairs, and the losses of ours.

    Raises  ValueError for rows of different devices, or without a pair.
    """
    machines = [sorted({_device(row) for row in rows}) for rows in (before, after)]
    if machines[0] != machines[1] or len(machines[0]) != 1:
        raise ValueError(
            f"times of different devices do not compare: {machines[0]} and {machines[1]}; "
            "measure both on one model of GPU"
        )
    earlier = {identity(row): row for row in before}
    pairs = [(earlier[identity(row)], row) for row in after if identity(row) in earlier]
    lines, losses = [], []
    for old, new in pairs:
        if old["status"] != TIMED:
            continue
        what = " ".join(str(new[key]) for key in ("op", "workload", "dtype", "pass", "contender"))
        if new["status"] != TIMED:
            if new["role"] == OURS and new["status"] != MISSING:
                losses.append(f"{what}: timed before, now {new['status']}: {new['reason']}")
            continue
        ratio = new["seconds"] / old["seconds"]
        lines.append([what, 1e3 * old["seconds"], 1e3 * new["seconds"], ratio])
        if new["role"] == OURS and ratio > 1 + tolerance:
            losses.append(f"{what}: {ratio:.3f} times the time")
    if not lines and not losses:
        raise ValueError("the two have no measurement in common; run the same operations and sizes")
    return lines, losses


def _device(row: Row) -> str:
    return row["cpu"] if row["gpu"] == "none" else row["gpu"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share of time; 0.05")
    arguments = parser.parse_args(argv)
    try:
        before, after = load(arguments.before), load(arguments.after)
        lines, losses = compare(before, after, arguments.tolerance)
    except ValueError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    print(table(("measurement", "ms before", "ms after", "ratio"), lines))
    for loss in losses:
        print(f"LOSS {loss}")
    print(f"{len(lines)} compared, {len(losses)} losses over {100 * arguments.tolerance:g} %")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
