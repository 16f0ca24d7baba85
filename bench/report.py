"""Markdown tables and plots of the rows that `pytest bench/` wrote.

    python -m bench.report [FILE OR FOLDER ...] [--output FOLDER]

Without arguments: bench/results, each folder of which gets its report.md and pictures beside the
rows.

A time is the median with its quartiles; "x eager" and the like say how many times faster than that
contender of the same run; light is the share of the least possible time, against the ceilings
measured in the run and, after the slash, against the datasheet. MFU (of the datasheet's peak) and
the share of the measured GEMM rate count causal FLOPs and, after the slash, nanochat's formula.
"""

import argparse
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.contenders import TIMED
from bench.rows import RESULTS, Row, auto_losses, load
from nanochat import command
from nanochat.report import table

Columns = dict[str, Callable[[Row], object]]


def _shares(*names: str) -> Callable[[Row], str]:
    """A cell of percentages, one after the other."""
    return lambda row: "/".join(
        "?" if row[name] is None else f"{100 * row[name]:.1f}" for name in names
    )


def _memory(unit: int) -> Callable[[Row], float | None]:
    return lambda row: None if row["peak_bytes"] is None else row["peak_bytes"] / unit


def _over(role: str) -> Callable[[Row], object]:
    return lambda row: row[f"over_{role}"] or "-"


def _settings(row: Row) -> str:
    """The configuration of each kernel."""
    return "; ".join(
        f"{kernel}: {' '.join(f'{key}={value}' for key, value in entry.items())}"
        for kernel, entry in row["config"].items()
    )


TIMES: Columns = {
    "ms": lambda row: 1e3 * row["seconds"],
    "quartiles": lambda row: " - ".join(
        f"{1e3 * row[name]:.4g}" for name in ("lower_quartile", "upper_quartile")
    ),
}
KERNEL_COLUMNS: Columns = {
    "contender": lambda row: row["contender"] + " (auto)" * row["auto"],
    **TIMES,
    "x eager": _over("eager"),
    "x compile": _over("compile"),
    "x best peer": _over("peer"),
    "TFLOP/s": lambda row: row["tflops"],
    "GB/s": lambda row: row["gb_per_s"],
    "light %": _shares("sol_measured", "sol_datasheet"),
    "peak MiB": _memory(2**20),
    "configuration": lambda row: _settings(row) or "-",
}
STEP_COLUMNS: Columns = {
    "kernels": lambda row: row["contender"],
    **TIMES,
    "tok/s": lambda row: row["tokens_per_second"],
    "x sdpa": _over("eager"),
    "MFU %": _shares("mfu_causal", "mfu_nanochat"),
    "of GEMM %": _shares("gemm_share_causal", "gemm_share_nanochat"),
    "peak GiB": _memory(2**30),
    "micro-batch": lambda row: row["micro_batch_tokens"],
}
# kind of rows, what the rows of one table have in common, its title, its columns
TABLES = (
    ("kernel", ("op", "workload", "pass", "dtype"),
     "{op} {workload}, {pass}: {shapes}, {dtype}", KERNEL_COLUMNS),
    ("train_step", ("workload",),
     "Optimizer step of {workload}, {tokens:,} tokens", STEP_COLUMNS),
)  # fmt: skip
MACHINE = ("gpu", "cpu", "driver", "torch", "triton", "cuda", "commit", "dirty", "date", "dtype")


def markdown(rows: Sequence[Row]) -> str:
    """All tables, and what was not timed or not chosen well."""
    parts = [_machine(rows)]
    for kind, keys, title, columns in TABLES:
        for group in _groups((row for row in rows if row["kind"] == kind), keys):
            timed = [[cell(row) for cell in columns.values()] for row in group
                     if row["status"] == TIMED]  # fmt: skip
            if timed:
                parts.append(f"## {title.format_map(group[0])}\n\n{table(tuple(columns), timed)}")
    parts += [_listing("Not timed", _absent(rows)), _listing("auto", _auto(rows))]
    return aligned("\n\n".join(filter(None, parts)))


def aligned(text: str) -> str:
    """The text with the columns of its tables padded, to be read as it is."""
    lines = text.split("\n")
    for is_table, block in itertools.groupby(range(len(lines)), lambda i: lines[i][:1] == "|"):
        if not is_table:
            continue
        numbers = list(block)
        cells = [re.split(r"(?<!\\)\|", lines[i].strip("|")) for i in numbers]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for i, row in zip(numbers, cells, strict=True):
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines[i] = f"|{'|'.join(padded)}|"
    return "\n".join(lines)


def _groups(rows: Iterable[Row], keys: Sequence[str]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def _machine(rows: Sequence[Row]) -> str:
    """What the rows were measured on; several values where they were put together."""
    lines = []
    for name in MACHINE:
        values = dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None)
        if values:
            lines.append((name, ", ".join(values)))
    clocks = [row["sm_mhz"] for row in rows if row.get("sm_mhz")]
    if clocks:
        lines.append(("SM clock, MHz", f"{min(clocks)} to {max(clocks)}"))
    first = rows[0]
    lines.append(("measured GEMM, TFLOP/s", first["gemm_flops"] / 1e12))
    lines.append(("measured copy, GB/s", first["copy_bytes_per_s"] / 1e9))
    note = "" if first["gpu"] != "none" else "Small shapes on a CPU: they say nothing of a GPU.\n\n"
    return f"# nanochat bench\n\n{note}{table(('', ''), lines)}"


def _absent(rows: Iterable[Row]) -> list[str]:
    absent = [row for row in rows if row["status"] != TIMED]
    return list(dict.fromkeys(
        f"{row['op']} {row['workload']}: {row['contender']} is {row['status']}: {row['reason']}"
        for row in absent
    ))  # fmt: skip


def _auto(rows: Sequence[Row]) -> list[str]:
    if all(row["kind"] != "kernel" for row in rows):
        return []
    return auto_losses(rows) or ["`--kernels=auto` picks the fastest implementation everywhere."]


def _listing(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


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
    command.run(main)
