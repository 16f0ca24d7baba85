"""Markdown tables and plots of the rows that `pytest bench/` wrote.

    python -m bench.report [FILE OR FOLDER ...] [--output FOLDER]

Without arguments: bench/results, each folder of which gets its report.md and pictures beside the
rows. The columns are explained in bench/tables.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.rows import TIMED, Row, load
from bench.tables import markdown

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders of rows")
    parser.add_argument("--output", type=Path, help="folder to write to; the rows' own")
    arguments = parser.parse_args(argv)
    paths = arguments.paths or sorted(p for p in RESULTS.glob("*") if p.is_dir())
    if not paths:
        raise SystemExit(f"no rows under {RESULTS}: run `pytest bench/` on a GPU first")
    for path in paths:
        try:
            rows = load(path)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        folder = arguments.output or (path if path.is_dir() else path.parent)
        if len(paths) > 1 and arguments.output:
            folder = folder / path.stem
        print(write(rows, folder))


def write(rows: Sequence[Row], folder: Path) -> Path:
    """report.md and one picture for each operation; the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [markdown(rows)]
    for op in dict.fromkeys(row["op"] for row in rows if row["kind"] == "kernel"):
        of_op = [row for row in rows if row["op"] == op and row["whole"]]
        if plot(op, of_op, folder / f"{op}.png"):
            parts.append(f"![{op}]({op}.png)")
    output = folder / "report.md"
    output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return output


def plot(op: str, rows: Sequence[Row], path: Path) -> bool:
    """Bars of the whole pass by workload and contender; False with nothing to draw."""
    timed = [row for row in rows if row["status"] == TIMED]
    if not timed:
        return False
    # imported where a picture is drawn: it takes a second that no test should pay
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(row["workload"] for row in timed))
    figure = Figure(figsize=(4 * len(workloads), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for index, workload in enumerate(workloads):
        bars = [row for row in timed if row["workload"] == workload]
        axes = figure.add_subplot(1, len(workloads), index + 1)
        ms = [1e3 * row["seconds"] for row in bars]
        spread = [
            [value - 1e3 * row["lower_quartile"] for value, row in zip(ms, bars, strict=True)],
            [1e3 * row["upper_quartile"] - value for value, row in zip(ms, bars, strict=True)],
        ]
        axes.bar([row["contender"] for row in bars], ms, yerr=spread, capsize=3)
        light = min(row["seconds"] * row["sol_measured"] for row in bars)
        axes.axhline(1e3 * light, linestyle="--", color="black", label="speed of light")
        axes.set(title=f"{op} {workload}, {bars[0]['pass']}", ylabel="ms")
        axes.tick_params(axis="x", rotation=45)
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


if __name__ == "__main__":
    main()
