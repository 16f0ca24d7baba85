"""A profile as a record, and a record as tables: where the time of a step goes.

    share of speed of light = max(FLOPs / FLOP/s of a matrix product, bytes / bytes/s of a copy) / t

Both rates are measured on the device at hand, so no operation is held to a datasheet. FLOPs and
bytes are what the operation must do at least (`Cost` in kernels/registry.py), whatever the
implementation does beyond it; data that stays in a cache between two operations can therefore pass
100 %.

    MFU   FLOPs of the model by formula, causal or not, against the peak: what a token needs
    HFU   FLOPs of every operation that ran: with the optimizer's, and with what is computed twice
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from nanochat.hardware import mfu
from nanochat.kernels.registry import Cost
from nanochat.kernels.roofline import speed_of_light
from nanochat.profiler.capture import Captured
from nanochat.profiler.throughput import Meter
from nanochat.profiler.timeline import COMMUNICATION, DATA, IDLE

Record = Mapping[str, Any]
TOP = 12  # kernels that a table shows
SMALLEST = 0.002  # share of the step of a row of its own
WITHOUT_OPERATIONS = (DATA, COMMUNICATION, IDLE)
# what is said of a CPU, and of a GPU
NAMES = {DATA: ("data", "data"), IDLE: ("idle: Python between operations", "idle: no kernel runs")}


class Table(NamedTuple):
    """A title, the names of the columns, rows of text, and how many columns are names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1

    def text(self) -> str:
        """Aligned for a console: names left, numbers right."""
        lines = [self.columns, *self.rows] if any(self.columns) else self.rows
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        aligned = [
            "  ".join(
                cell.ljust(width) if i < self.names else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line}" for line in aligned)])


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: FLOP/s of a matrix product, bytes/s of a copy; both measured."""

    flops_per_second: float
    bytes_per_second: float


def breakdown(
    captured: Captured,
    meter: Meter,
    ceilings: Ceilings,
    unprofiled: Sequence[float],
    device: str,
    device_name: str,
    dtype: str,
    compiled: bool,
) -> dict[str, Any]:
    """The record of a profile: seconds, calls, FLOPs and bytes are those of one step.

    unprofiled   seconds of the steady steps before, none if there were none
    device       "cpu", "cuda", ...
    device_name  what the operating system or the driver calls it
    """
    division, tally, steps = captured.division, captured.tally, captured.division.steps
    profiled = sum(captured.seconds) / steps
    rows = []
    for (category, operation), time in division.nanoseconds.most_common():
        key = category, operation
        row: dict[str, Any] = {
            "category": category,
            "operation": operation,
            "seconds": time / steps / 1e9,
        }
        if calls := tally.calls[key]:
            flops, moved = tally.flops[key] / steps, tally.bytes[key] / steps
            least = speed_of_light(
                Cost(flops, moved), ceilings.flops_per_second, ceilings.bytes_per_second
            )
            row |= {"calls": calls / steps, "flops": flops, "bytes": moved}
            row |= {"speed_of_light": least / row["seconds"] if time else None}
        rows.append(row)
    seconds = median(unprofiled) if unprofiled else profiled
    # a compiled graph does not tell what its operations do
    hardware_flops = None if compiled else sum(row.get("flops", 0.0) for row in rows)
    return {
        "device": device,
        "device_name": device_name,
        "dtype": dtype,
        "compiled": compiled,
        "steps": steps,
        "step_seconds": profiled,
        "unprofiled_step_seconds": median(unprofiled) if unprofiled else None,
        "categories": {k: v / steps / 1e9 for k, v in division.by_category().items()},
        "operations": rows,
        "gemm_flops_per_second": ceilings.flops_per_second,
        "copy_bytes_per_second": ceilings.bytes_per_second,
        "gaps_per_step": len(division.gaps) / steps,
        "longest_gap_seconds": max(division.gaps, default=0) / 1e9,
        "top": [
            {"name": name, "seconds": time / steps / 1e9, "calls": calls / steps}
            for name, (time, calls) in list(division.top.items())[:TOP]
        ],
        **({} if meter.emulated else _utilisation(meter, seconds, hardware_flops)),
    }


def _utilisation(meter: Meter, seconds: float, hardware_flops: float | None) -> dict[str, Any]:
    """MFU by both formulas, and HFU, against both peaks; None where one is not known."""
    rate = meter.tokens_per_step / seconds
    model = {"mfu_causal": meter.flops_causal, "mfu_nanochat": meter.flops_nanochat}
    found: dict[str, Any] = {}
    for peak_name, peak in (
        ("datasheet", meter.peaks.datasheet),
        ("gemm", meter.peaks.measured_gemm),
    ):
        for name, flops in model.items():
            value = mfu(flops, rate, peak, meter.world_size) if peak else None
            found[f"{name}_of_{peak_name}"] = value
        # this rank's own FLOPs against this rank's peak
        hfu = hardware_flops / seconds / peak if hardware_flops is not None and peak else None
        found[f"hfu_of_{peak_name}"] = hfu
    return found


def tables(record: Record) -> list[Table]:
    """What a record says: overview, stages, operations, kernels."""
    found = [_overview(record), _stages(record), _operations(record), _top(record)]
    return [table for table in found if table.rows]


def text(record: Record) -> str:
    """All tables, for a console."""
    return "\n\n".join(table.text() for table in tables(record))


def _overview(record: Record) -> Table:
    plain, profiled = record.get("unprofiled_step_seconds"), record["step_seconds"]
    rows = [("device", f"{record['device_name']}, {record['dtype']}")]
    rows.append((f"step, mean of {record['steps']} profiled", _ms(profiled)))
    if plain:
        added = 100 * (profiled / plain - 1)
        note = (
            f"profiled ones took {added:.1f} % longer" if added > 0 else "profiled ones no longer"
        )
        rows.append(("step, median of those before", f"{_ms(plain)}; {note}"))
    flops, moved = record["gemm_flops_per_second"], record["copy_bytes_per_second"]
    rows.append(("matrix product, measured", f"{flops / 1e9:,.0f} GFLOP/s"))
    rows.append(("copy, measured", f"{moved / 1e9:,.1f} GB/s"))
    for key, title in (
        ("mfu_causal", "MFU, causal FLOPs"),
        ("mfu_nanochat", "MFU, nanochat formula"),
        ("hfu", "HFU, FLOPs of all operations"),
    ):
        for peak, of in (("datasheet", "of the datasheet"), ("gemm", "of the measured product")):
            value = record.get(f"{key}_of_{peak}")
            if value is not None:
                rows.append((f"{title}, {of}", f"{100 * value:.1f} %"))
    if _on_gpu(record):
        gaps, longest = record["gaps_per_step"], record["longest_gap_seconds"]
        rows.append(("gaps between kernels", f"{gaps:,.0f} a step, the longest {_ms(longest)}"))
    return Table("Profile", ("", ""), rows, names=2)


def _stages(record: Record) -> Table:
    total = record["step_seconds"]
    rows = [
        (NAMES.get(name, (name, name))[_on_gpu(record)], _ms(seconds), _percent(seconds, total))
        for name, seconds in record["categories"].items()
        if seconds
    ]
    accounted = sum(record["categories"].values())
    rows.append(("together", _ms(accounted), _percent(accounted, total)))
    return Table("Where the time of a step goes", ("stage", "time", "share"), rows)


def _operations(record: Record) -> Table:
    total, rows, small = record["step_seconds"], [], []
    for row in record["operations"]:
        seconds = row["seconds"]
        if row["category"] in WITHOUT_OPERATIONS:
            continue
        if seconds < SMALLEST * total:
            small.append(seconds)
            continue
        rate = ["", "", "", ""]
        if "calls" in row:
            rate = [
                f"{row['calls']:,.0f}",
                f"{row['flops'] / seconds / 1e9:,.1f}" if row["flops"] else "",
                f"{row['bytes'] / seconds / 1e9:,.2f}",
                f"{100 * row['speed_of_light']:.0f} %",
            ]
        rows.append(
            (row["category"], row["operation"], _ms(seconds), _percent(seconds, total), *rate)
        )
    if small:
        name = f"{len(small)} smaller ones, each under {100 * SMALLEST:.1f} %"
        rows.append(("", name, _ms(sum(small)), _percent(sum(small), total), "", "", "", ""))
    columns = ("stage", "operation", "time", "share", "calls", "GFLOP/s", "GB/s", "speed of light")
    return Table("Operations of a step", columns, rows, names=2)


def _top(record: Record) -> Table:
    what = "GPU kernels" if _on_gpu(record) else "operations of PyTorch, without those they call"
    total = record["step_seconds"]
    rows = [
        (
            kernel["name"][:60],
            _ms(kernel["seconds"]),
            _percent(kernel["seconds"], total),
            f"{kernel['calls']:,.0f}",
        )
        for kernel in record["top"]
    ]
    return Table(f"Top {what}", ("name", "time", "share", "calls"), rows)


def _on_gpu(record: Record) -> bool:
    return record["device"] != "cpu"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"
