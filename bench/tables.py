"""Rows as Markdown: what was measured, on what, and what was not timed or not chosen well.

A time is the median with its quartiles; "x eager" and the like say how many times faster than that
contender of the same run; light is the share of the least possible time, against the ceilings
measured in the run and, after the slash, against the datasheet. MFU (of the datasheet's peak) and
the share of the measured GEMM rate count causal FLOPs and, after the slash, nanochat's formula.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench.rows import TIMED, Row, auto_losses
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
