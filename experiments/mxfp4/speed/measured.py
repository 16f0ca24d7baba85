"""What an RTX 5090 should show, beside what others reached and what the forecast allows.

    python -m experiments.mxfp4.speed.measured                           # nothing measured yet
    python -m experiments.mxfp4.speed.measured results/<gpu>             # with what is there
    python -m experiments.mxfp4.speed.measured results/<gpu> d12=RUN_DIR:RUN_DIR ...

prints the table of the README, whose last column is "not measured" until bench_sm120.sh has run.
Folders of base_train runs, in groups of one model size, become rows of whole training steps in
results/<gpu>/steps.json. A run counts for the precision its "start" record names.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.mxfp4.speed import forecast
from experiments.mxfp4.speed.bench import BF16, LARGE, WITH_QUANTIZER
from nanochat import command
from nanochat.report import table
from nanochat.tracking import METRICS_FILE, read_records, write_json

NOT_MEASURED = "not measured"
BENCH, STEPS = "bench.json", "steps.json"
WARM_STEPS = 10  # compilation, allocator, clocks
LARGE_SHAPE = " x ".join(map(str, LARGE))
SPEEDUP = "speedup"  # bfloat16's seconds over those of a row, in place of one of its fields

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    others  what other programs reached, as their authors report it
    bound   the forecast
    kind, name, shape, field  where the measured value is: a row's, and its field or SPEEDUP
    """

    what: str
    others: str
    bound: str
    kind: str
    name: str
    shape: str
    field: str = SPEEDUP

    def read(self, rows: Rows) -> str:
        """The measured value among the rows, or NOT_MEASURED."""
        found = {r["name"]: r for r in rows if (r["kind"], r["shape"]) == (self.kind, self.shape)}
        own, base = found.get(self.name), found.get(BF16)
        if own is None or (base is None and self.field == SPEEDUP):
            return NOT_MEASURED
        if base is not None and self.field == SPEEDUP:
            return f"{base['seconds'] / own['seconds']:.2f}"
        return f"{own[self.field]:,.0f}"


def forecast_ratio(recipe: str, depth: int, what: str) -> str:
    """The forecast, times bfloat16."""
    ratios = forecast.ratios(recipe, forecast.REACHED, what)
    return f"{ratios[forecast.DEPTHS.index(depth)]:.2f}"


def figures() -> list[Figure]:
    """The lines, in order."""
    linear, step, _ = forecast.WHAT
    fp4 = f"{forecast.DATASHEET.fp4 / 1e12:,.0f}"
    memory = f"{forecast.DATASHEET.memory / 1e9:,.0f}"
    stochastic = "mxfp4 rceil stochastic hadamard: rows and columns"
    lines = [
        Figure(f"MXFP4 product {LARGE_SHAPE}, TFLOP/s", "874 (Triton 3.6, NVFP4), 1304 (qutlass)",
               fp4, "gemm", "mxfp4", LARGE_SHAPE, "tflops"),
        Figure("the same, a transformed and quantized on the way", "1281 (qutlass)", fp4,
               "gemm", WITH_QUANTIZER, LARGE_SHAPE, "tflops"),
        Figure("quantizer, both orientations, GB/s", "", memory,
               "quantize", "mxfp4: rows and columns", "65536 x 3072", "gb_per_s"),
        Figure("the same, stochastic with Hadamard", "", memory,
               "quantize", stochastic, "65536 x 3072", "gb_per_s"),
    ]  # fmt: skip
    others = {("mxfp4_rtn", 12): "1.64 (Quartet, 800M)"}
    for depth in (8, 12, 20):
        for recipe in ("mxfp4_rtn", "mx8f_mx4b"):
            what = f"linear layers d{depth}, {recipe}, times bf16"
            reached = others.get((recipe, depth), "")
            allowed = forecast_ratio(recipe, depth, linear)
            lines.append(Figure(what, reached, allowed, "linear", recipe, f"d{depth}"))
    for depth in (8, 12, 20):
        what = f"training step d{depth}, mx8f_mx4b, times bf16"
        allowed = forecast_ratio("mx8f_mx4b", depth, step)
        lines.append(Figure(what, "", allowed, "step", "mx8f_mx4b", f"d{depth}"))
    what = "decoding, linear layers d20, times bf16"
    return [*lines, Figure(what, "", f"{16 / 4.25:.2f}", "decode", "mxfp4", "d20")]


def step_row(shape: str, folder: Path) -> dict[str, Any]:
    """Median seconds of a step. Raises ValueError for a run that is emulated or too short."""
    records = list(read_records(folder / METRICS_FILE))
    precision: Mapping[str, Any] = next(r for r in records if r["kind"] == "start")["precision"]
    # records from before "emulated" was written name the backend
    if precision.get("emulated", precision.get("backend") == "emulate"):
        raise ValueError(f"{folder} multiplied by emulation: its time is no speed")
    steps = [r for r in records if r["kind"] == "train"]
    if len(steps) <= WARM_STEPS:
        raise ValueError(f"{folder} has {len(steps)} steps; more than {WARM_STEPS} are needed")
    return {
        "kind": "step",
        "name": BF16 if precision["name"] == "plain" else precision["recipe"],
        "shape": shape,
        "seconds": median(r["step_seconds"] for r in steps[WARM_STEPS:]),
        "tokens_per_second": median(r["tokens_per_second"] for r in steps[WARM_STEPS:]),
        "memory_gib": max(r["memory_gib"] for r in steps),
        "flop_shares": precision.get("flop_shares", {}),
    }


def read_rows(folder: Path) -> list[Mapping[str, Any]]:
    """Rows of the benchmark and of the training steps in a folder; those that are there."""
    rows: list[Mapping[str, Any]] = []
    for name in (BENCH, STEPS):
        path = folder / name
        if path.exists():
            rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def markdown(rows: Rows) -> str:
    """The table."""
    columns = ("RTX 5090", "others", "upper bound (forecast)", "this code")
    lines = [(f.what, f.others, f.bound, f.read(rows)) for f in figures()]
    return table(columns, lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.mxfp4.speed.measured")
    parser.add_argument("folder", nargs="?", type=Path, help="of bench.json and steps.json")
    parser.add_argument("runs", nargs="*", help="shape=folder:folder... of training runs")
    arguments = parser.parse_args(argv)
    if arguments.runs:
        groups = (group.partition("=") for group in arguments.runs)
        steps = [step_row(shape, Path(run)) for shape, _, runs in groups for run in runs.split(":")]
        write_json(arguments.folder / STEPS, {"rows": steps})
    sys.stdout.write(markdown(read_rows(arguments.folder) if arguments.folder else []))


if __name__ == "__main__":
    command.run(main)
