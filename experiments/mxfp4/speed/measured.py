"""What an RTX 5090 should show, beside what others reached and what the forecast allows.

    python -m experiments.mxfp4.speed.measured [results/<gpu>]

prints the table of the README: the last column is "not measured" until bench_sm120.sh has run.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.mxfp4.speed import forecast
from experiments.mxfp4.speed.bench import BF16, LARGE, WITH_QUANTIZER

NOT_MEASURED = "not measured"
BENCH, STEPS = "bench.json", "steps.json"
LARGE_SHAPE = " x ".join(map(str, LARGE))

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A line of the table; read finds its value among the rows, None if it is not there."""

    what: str
    anchor: str
    bound: str
    read: Callable[[Rows], str | None]


def value(rows: Rows, kind: str, name: str, shape: str, field: str) -> float | None:
    """A field of the row of that kind, name and shape."""
    for row in rows:
        if (row["kind"], row["name"], row["shape"]) == (kind, name, shape):
            return row.get(field)
    return None


def number(kind: str, name: str, shape: str, field: str) -> Callable[[Rows], str | None]:
    """Reads one number."""

    def read(rows: Rows) -> str | None:
        found = value(rows, kind, name, shape, field)
        return None if found is None else f"{found:,.0f}"

    return read


def ratio(kind: str, name: str, shape: str) -> Callable[[Rows], str | None]:
    """Reads bfloat16's seconds over those of `name`."""

    def read(rows: Rows) -> str | None:
        base = value(rows, kind, BF16, shape, "seconds")
        found = value(rows, kind, name, shape, "seconds")
        return None if base is None or found is None else f"{base / found:.2f}"

    return read


def bound(recipe: str, depth: int, what: str) -> str:
    """The forecast's ratio."""
    ratios = forecast.ratios(recipe, forecast.REACHED, what)
    return f"{ratios[forecast.DEPTHS.index(depth)]:.2f}"


def figures() -> list[Figure]:
    """The lines, in order."""
    linear, step, _ = forecast.WHAT
    fp4 = f"{forecast.DATASHEET.fp4 / 1e12:,.0f}"
    memory = f"{forecast.DATASHEET.memory / 1e9:,.0f}"
    lines = [
        Figure(f"MXFP4 product {LARGE_SHAPE}, TFLOP/s", "874 (Triton 3.6, NVFP4), 1304 (qutlass)",
               fp4, number("gemm", "mxfp4", LARGE_SHAPE, "tflops")),
        Figure("the same, a transformed and quantized on the way", "1281 (qutlass)", fp4,
               number("gemm", WITH_QUANTIZER, LARGE_SHAPE, "tflops")),
        Figure("quantizer, both orientations, GB/s", "", memory,
               number("quantize", "mxfp4: rows and columns", "65536 x 3072", "gb_per_s")),
        Figure("the same, stochastic with Hadamard", "", memory,
               number("quantize", "mxfp4 rceil stochastic hadamard: rows and columns",
                      "65536 x 3072", "gb_per_s")),
    ]  # fmt: skip
    anchors = {("mxfp4_rtn", 12): "1.64 (Quartet, 800M)"}
    for depth in (8, 12, 20):
        for recipe in ("mxfp4_rtn", "mx8f_mx4b"):
            lines.append(
                Figure(
                    f"linear layers d{depth}, {recipe}, times bf16",
                    anchors.get((recipe, depth), ""),
                    bound(recipe, depth, linear),
                    ratio("linear", recipe, f"d{depth}"),
                )
            )
    for depth in (8, 12, 20):
        lines.append(
            Figure(
                f"training step d{depth}, mx8f_mx4b, times bf16",
                "",
                bound("mx8f_mx4b", depth, step),
                ratio("step", "mx8f_mx4b", f"d{depth}"),
            )
        )
    lines.append(
        Figure("decoding, linear layers d20, times bf16", "", f"{16 / 4.25:.2f}",
               ratio("decode", "mxfp4", "d20"))
    )  # fmt: skip
    return lines


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
    lines = ["| RTX 5090 | others | upper bound (forecast) | this code |", "|---|---|---|---|"]
    for figure in figures():
        found = figure.read(rows)
        cells = (figure.what, figure.anchor, figure.bound, found or NOT_MEASURED)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = sys.argv[1:]
    sys.stdout.write(markdown(read_rows(Path(arguments[0])) if arguments else []))


if __name__ == "__main__":
    main()
