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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.contenders import TIMED
from bench.rows import RESULTS, Row, auto_losses, load
from nanochat import command
from nanochat.report import table

KERNEL_COLUMNS = (
    "contender", "ms", "quartiles", "x eager", "x compile", "x best peer",
    "TFLOP/s", "GB/s", "light %", "peak MiB", "configuration",
)  # fmt: skip
STEP_COLUMNS = (
    "kernels", "ms", "quartiles", "tok/s", "x sdpa", "MFU %", "of GEMM %",
    "peak GiB", "micro-batch",
)  # fmt: skip
MACHINE = ("gpu", "cpu", "driver", "torch", "triton", "cuda", "commit", "dirty", "date", "dtype")


def markdown(rows: Sequence[Row]) -> str:
    """All tables, and what was not timed or not chosen well."""
    parts = [_machine(rows)]
    keys = ("op", "workload", "pass", "dtype")
    for (op, workload, name, dtype), group in _groups(rows, "kernel", keys):
        title = f"## {op} {workload}, {name}: {group[0]['shapes']}, {dtype}"
        timed = [_kernel_cells(row) for row in group if row["status"] == TIMED]
        if timed:
            parts.append(f"{title}\n\n{table(KERNEL_COLUMNS, timed)}")
    for (workload,), group in _groups(rows, "train_step", ("workload",)):
        timed = [_step_cells(row) for row in group if row["status"] == TIMED]
        if timed:
            tokens = f"{group[0]['tokens']:,}"
            parts.append(
                f"## Optimizer step of {workload}, {tokens} tokens\n\n{table(STEP_COLUMNS, timed)}"
            )
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


def _groups(rows: Iterable[Row], kind: str, keys: Sequence[str]) -> list[tuple[Any, list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


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


def _kernel_cells(row: Row) -> list[object]:
    light = [_percent(row[name]) for name in ("sol_measured", "sol_datasheet")]
    memory = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
    over = [row[f"over_{role}"] or "-" for role in ("eager", "compile", "peer")]
    chosen = " (auto)" if row["auto"] else ""
    settings = "; ".join(f"{key}: {_settings(value)}" for key, value in row["config"].items())
    return [
        row["contender"] + chosen, *_times(row), *over, row["tflops"], row["gb_per_s"],
        "/".join(light), memory, settings or "-",
    ]  # fmt: skip


def _step_cells(row: Row) -> list[object]:
    mfu, share = (
        "/".join(_percent(row[f"{of}_{flops}"]) for flops in ("causal", "nanochat"))
        for of in ("mfu", "gemm_share")
    )
    memory = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
    return [
        row["contender"], *_times(row), row["tokens_per_second"], row["over_eager"] or "-",
        mfu, share, memory, row["micro_batch_tokens"],
    ]  # fmt: skip


def _times(row: Row) -> list[object]:
    quartiles = (1e3 * row["lower_quartile"], 1e3 * row["upper_quartile"])
    return [1e3 * row["seconds"], " - ".join(f"{ms:.4g}" for ms in quartiles)]


def _settings(values: dict[str, int]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f}"


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
