"""Rows of whole training steps from the records of base_train runs.

    python -m experiments.mxfp4.speed.steps --output=FILE d12=RUN_DIR:RUN_DIR ...

A run counts for the precision its "start" record names. Runs with emulated products have no speed
and are refused.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nanochat.tracking import METRICS_FILE, read_records

WARM_STEPS = 10  # compilation, allocator, clocks


def step_row(shape: str, folder: Path) -> dict[str, Any]:
    """Median seconds of a step. Raises ValueError for a run that is emulated or too short."""
    records = list(read_records(folder / METRICS_FILE))
    precision: Mapping[str, Any] = next(r for r in records if r["kind"] == "start")["precision"]
    if precision.get("emulated", precision.get("backend") == "emulate"):
        raise ValueError(f"{folder} multiplied by emulation: its time is no speed")
    steps = [r for r in records if r["kind"] == "train"]
    if len(steps) <= WARM_STEPS:
        raise ValueError(f"{folder} has {len(steps)} steps; more than {WARM_STEPS} are needed")
    plain = precision["name"] == "plain"
    return {
        "kind": "step",
        "name": "bfloat16" if plain else precision["recipe"],
        "shape": shape,
        "seconds": median(r["step_seconds"] for r in steps[WARM_STEPS:]),
        "tokens_per_second": median(r["tokens_per_second"] for r in steps[WARM_STEPS:]),
        "memory_gib": max(r["memory_gib"] for r in steps),
        "flop_shares": precision.get("flop_shares", {}),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.mxfp4.speed.steps")
    parser.add_argument("runs", nargs="+", help="shape=folder:folder...")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)
    rows = []
    for group in arguments.runs:
        shape, _, folders = group.partition("=")
        rows += [step_row(shape, Path(folder)) for folder in folders.split(":")]
    text = json.dumps({"rows": rows}, indent=1)
    arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
