"""Rows: one measured, refused or missing contender each, with the machine it ran on.

A file is a JSON list of rows. What is measured again replaces its row, so files grow case by case
and a run that is cut short keeps what it has.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.contenders import TIMED
from bench.measure import UNSAVED
from nanochat.common import replace_file
from nanochat.tracking import jsonable

Row = dict[str, Any]
IDENTITY = ("kind", "op", "workload", "dtype", "pass", "contender", "gpu")
RESULTS = Path(__file__).parent / "results"
AUTO_NOISE = 0.03  # within this share of the fastest, `auto` is as good


def identity(row: Row) -> tuple[Any, ...]:
    """What makes two rows measurements of the same thing."""
    return tuple(row.get(name) for name in IDENTITY)


def load(path: Path) -> list[Row]:
    """Rows of a JSON file, or of every rows file in a folder and below.

    Raises  ValueError if there are none, or a file holds something else.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    rows = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist; give a file or folder that bench wrote")
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, list) and all("contender" in row for row in content):
            rows += content
        elif not path.is_dir():
            raise ValueError(f"{file} holds no benchmark rows; give a file that bench wrote")
    if not rows:
        raise ValueError(f"no benchmark rows under {path}; run `pytest bench/ --out={path}` first")
    return rows


def save(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file in one rename; a row measured again replaces the one before."""
    known = {identity(row): row for row in (load(path) if path.exists() else [])}
    for row in rows:
        known[identity(row)] = {key: value for key, value in row.items() if key != UNSAVED}
    lines = ",\n".join(json.dumps(jsonable(row), allow_nan=False) for row in known.values())
    replace_file(path, f"[\n{lines}\n]\n")


def speedup(row: Row, others: Sequence[Row]) -> float | None:
    """How many times faster than the fastest of `others`; None without one."""
    times = [other["seconds"] for other in others if other["status"] == TIMED]
    return min(times) / row["seconds"] if times and row["status"] == TIMED else None


def auto_losses(rows: Sequence[Row]) -> list[str]:
    """Where `--kernels=auto` does not pick the fastest implementation measured, one line each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == "kernel" and row["whole"] and row["role"] in ("eager", "ours"):
            key = tuple(row[name] for name in ("op", "workload", "dtype", "gpu"))
            groups.setdefault(key, []).append(row)
    losses = []
    for (op, workload, dtype, _), group in groups.items():
        timed = [row for row in group if row["status"] == TIMED]
        chosen = [row for row in group if row["auto"]]
        if not timed or not chosen:
            continue
        best, auto = min(timed, key=lambda row: row["seconds"]), chosen[0]
        where = f"{op} {workload} {dtype}: auto picks {auto['contender']}"
        if auto["status"] != TIMED:
            losses.append(f"{where}, which was refused: {auto['reason']}")
        elif auto["seconds"] > (1 + AUTO_NOISE) * best["seconds"]:
            share = auto["seconds"] / best["seconds"]
            losses.append(f"{where}, {share:.2f} times the time of {best['contender']}")
    return losses
