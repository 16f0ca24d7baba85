"""report.md from the records of every run under the base directory.

    python -m nanochat.report generate [--base_dir DIR] [--output FILE]
    python -m nanochat.report reset    [--base_dir DIR]

A section appears where records for it exist; stages without any are named. Of a stage that ran
several times, the last run of the last written folder counts. `reset` deletes the report, never the
records.
"""

import argparse
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat import command, stages
from nanochat.common import get_base_dir, replace_file
from nanochat.profiler import breakdown, toggles
from nanochat.tracking import METRICS_FILE, environment, read_records

PLAN_ROWS = {
    "depth": "depth",
    "num_params": "parameters",
    "num_iterations": "optimizer steps",
    "total_batch_size": "tokens per step",
    "world_size": "devices",
    "flops_per_token_causal": "FLOPs per token, causal",
    "flops_per_token_nanochat": "FLOPs per token, nanochat formula",
    "dtype": "compute dtype",
}
# kind and value of a record, and what its curve is called
CURVES = (
    ("train", "loss", "training loss, nats per token"),
    ("eval", "loss", "validation loss, nats per token"),
    ("eval", "bpb", "validation bits per byte"),
    ("train", "reward", "mean reward"),
    ("train", "length", "tokens of an answer, mean"),
    ("eval", "pass@1", "pass@1"),
)
# kinds of records with a section of their own; the last step of any other becomes a table
SHOWN_ELSEWHERE = {"start", "resume", "plan", "train", "sample", "end", "profile", "toggles"}
# values of a record that are not results
BOOKKEEPING = {"time", "run", "stage", "kind", "step", "settings", "environment"}
STEADY_AFTER = (
    10  # first steps compile and fill caches; medians leave them out where there are more
)

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="nanochat.report", description="report.md from the records of every run."
    )
    parser.error = command.usage_error
    parser.add_argument("command", choices=["generate", "reset"])
    for option in ("--base_dir", "--output"):
        parser.add_argument(option, option.replace("_", "-"), type=Path, default=None)
    arguments = parser.parse_args(argv)
    base_dir = arguments.base_dir or get_base_dir()
    if arguments.command == "reset":
        shutil.rmtree(base_dir / "report", ignore_errors=True)
        print(f"removed {base_dir / 'report'}")
        return
    output = arguments.output or base_dir / "report" / "report.md"
    if not generate(base_dir, output):
        raise ValueError(f"no {METRICS_FILE} under {base_dir}: run a stage first, then report")
    print(output)


def generate(base_dir: Path, output: Path) -> bool:
    """Write the report, its pictures beside it; False, and nothing written, without records."""
    runs = collect(base_dir)
    if not runs:
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    sections = [_header(runs), _summary(runs)]
    for stage, records in runs.items():
        sections.append(_stage_section(stage, records, output.parent))
    sections.append(_wall_clock(runs))
    replace_file(output, "\n\n".join(filter(None, sections)) + "\n")
    return True


def collect(base_dir: Path) -> dict[str, list[Record]]:
    """The last run of each stage, by stage, in the order of the pipeline."""
    latest: dict[str, list[Record]] = {}
    for path in sorted(base_dir.rglob(METRICS_FILE)):
        by_stage: dict[str, list[Record]] = {}
        for record in read_records(path):
            by_stage.setdefault(str(record.get("stage", path.parent.name)), []).append(record)
        for stage, records in by_stage.items():
            run = records[-1].get("run")
            chosen = [record for record in records if record.get("run") == run]
            if stage not in latest or _time(chosen[-1]) >= _time(latest[stage][-1]):
                latest[stage] = chosen
    order = [*stages.titles(), *sorted(latest.keys() - stages.titles().keys())]
    return {stage: latest[stage] for stage in order if stage in latest}


def results(folder: Path, step: int) -> str:
    """Tables of the records in a folder: training up to a step, evaluations at it; "" for none."""
    parts: list[str] = []
    for stage, records in collect(folder).items():
        known = [r for r in records if _is_number(r.get("step")) and r["step"] <= step]
        tables = _result_tables([r for r in known if r["step"] == step])
        if trained := _series(known, "train"):
            tables.insert(0, table(["", ""], _training_rows(known, trained)))
        parts += [f"### {stages.title_of(stage)}", *tables] if tables else []
    return "\n\n".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are written as `number` does."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(number, row)) + " |" for row in rows]
    return "\n".join(lines)


def number(value: object) -> str:
    """A value for a reader: thousands separated, four significant digits, text in one line."""
    if value is None:
        return "not known"
    if isinstance(value, list):
        return ", ".join(map(number, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return " ".join(str(value).split()).replace("|", "\\|")
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1e9:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _header(runs: Mapping[str, list[Record]]) -> str:
    starts = [r for records in runs.values() for r in records if "environment" in r]
    known: Record = starts[-1]["environment"] if starts else environment()
    machine: Record = known.get("hardware") or {}
    gpus = [str(gpu.get("name")) for gpu in machine.get("gpus") or []]
    commit = str(known.get("commit") or "not known")
    rows = [
        ("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("commit", commit + (" with uncommitted changes" if known.get("dirty") else "")),
        ("GPU", f"{len(gpus)} x {gpus[0]}" if gpus else "none"),
        ("CPU", f"{machine.get('cpu')}, {machine.get('cpu_cores')} cores"),
        ("memory", f"{machine.get('memory_gib')} GiB"),
        *((name, known.get(name)) for name in ("python", "torch", "triton", "cuda", "platform")),
    ]
    parts = ["# nanochat report", table(["", ""], rows)]
    absent = [title for stage, title in stages.titles().items() if stage not in runs]
    if absent:
        parts.append(f"Not run: {', '.join(absent)}.")
    return "\n\n".join(parts)


def _stage_section(stage: str, records: list[Record], folder: Path) -> str:
    trained = _series(records, "train")
    parts = [f"## {stages.title_of(stage)}"]
    rows = _training_rows(records, trained) if trained else _result_rows(records)
    if rows:
        parts.append(table(["", ""], rows))
    parts += _result_tables(records)
    picture = _plot(stage, records, folder)
    if picture:
        parts.append(picture)
    for kind, subject in (("profile", breakdown), ("toggles", toggles)):
        measured = _last_step([r for r in records if r.get("kind") == kind])
        for part in subject.tables(measured[-1]) if measured else ():
            parts.append(f"### {part.title}\n\n{table(part.columns, part.rows)}")
        if measured and kind == "toggles":
            toggles.draw(measured[-1], folder / f"{stage}_toggles.png")
            parts.append(f"![step time of each choice of kernels]({stage}_toggles.png)")
    samples = _last_step([r for r in records if r.get("kind") == "sample"])
    if samples:
        rows = [(r.get("prompt"), r.get("text")) for r in samples]
        heading = f"### Samples at step {samples[0].get('step')}\n\n"
        parts.append(heading + table(["prompt", "text"], rows))
    kernels = [r["kernels"] for r in records if isinstance(r.get("kernels"), Mapping)]
    if kernels:
        heading = "### Kernels\n\n"
        parts.append(heading + table(["operation", "implementation"], kernels[-1].items()))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _training_rows(records: list[Record], trained: list[Record]) -> list[tuple[str, object]]:
    plan, end = _merged(records, "plan"), _merged(records, "end")
    rows = [(title, plan[key]) for key, title in PLAN_ROWS.items() if key in plan]
    steps = len(trained)
    rows.append(("steps done", steps))
    if "total_batch_size" in plan:
        tokens = steps * plan["total_batch_size"]
        rows.append(("training tokens", tokens))
        if "flops_per_token_causal" in plan:
            rows.append(("training FLOPs, causal", float(tokens * plan["flops_per_token_causal"])))
    steady = trained[STEADY_AFTER:] or trained
    emulated = ", emulated: no speed" if any(r.get("emulated") for r in steady) else ""
    for key, title in (
        ("step_seconds", "seconds per step, median"),
        ("tokens_per_second", "tokens/s, median"),
    ):
        rows.append((title + emulated, _median(steady, key)))
    shares = (
        ("mfu_causal", "MFU against the datasheet, causal FLOPs"),
        ("mfu_nanochat", "MFU against the datasheet, nanochat formula"),
        ("gemm_share_causal", "share of the measured GEMM rate, causal FLOPs"),
        ("gemm_share_nanochat", "share of the measured GEMM rate, nanochat formula"),
    )
    for key, title in shares:
        if any(key in record for record in steady):
            share = _median(steady, key)
            rows.append((title, None if share is None else f"{100 * share:.1f} %"))
    memory = [r["memory_gib"] for r in [*trained, end] if _is_number(r.get("memory_gib"))]
    rows.append(("peak memory, GiB", end.get("peak_memory_gib") or max(memory, default=None)))
    bpb = [r for r in _series(records, "eval") if _is_number(r.get("bpb"))]
    if bpb:
        untrained = bpb[0]["bpb"] if bpb[0].get("step") == 0 else None
        best = min(r["bpb"] for r in bpb)
        rows += [("validation bpb, untrained", untrained), ("validation bpb, least", best)]
        if untrained:
            rows.append(("less than untrained", f"{100 * (1 - best / untrained):.1f} %"))
    return rows


def _result_rows(records: list[Record]) -> list[tuple[str, object]]:
    end = _merged(records, "end")
    return [
        (name.replace("_", " "), value)
        for name, value in end.items()
        if name not in BOOKKEEPING and not isinstance(value, Mapping | list)
    ]


def _result_tables(records: list[Record]) -> list[str]:
    """A table for each kind of result, such as losses of splits and scores of tasks."""
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        if record.get("kind") not in SHOWN_ELSEWHERE and "step" in record:
            by_kind.setdefault(str(record.get("kind")), []).append(record)
    tables = []
    for results in map(_last_step, by_kind.values()):
        columns = [name for name in dict.fromkeys(chain(*results)) if name not in BOOKKEEPING]
        if columns:
            tables.append(table(columns, [[r.get(name) for name in columns] for r in results]))
    return tables


def _plot(stage: str, records: list[Record], folder: Path) -> str:
    """Draw what is known of the steps; the picture in Markdown, or "" with nothing to draw."""
    points = [
        (label, [(r["step"], r[key]) for r in _series(records, kind) if _is_number(r.get(key))])
        for kind, key, label in CURVES
    ]
    points = [(label, curve) for label, curve in points if len(curve) > 1]
    if not points:
        return ""
    # imported where a picture is drawn: it takes a second that no other command should pay
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(points), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (label, curve) in enumerate(points):
        axes = figure.add_subplot(1, len(points), index + 1)
        axes.plot(*zip(*curve, strict=True))
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    figure.savefig(folder / f"{stage}.png", dpi=120)
    return f"![{'; '.join(label for label, _ in points)}]({stage}.png)"


def _summary(runs: Mapping[str, list[Record]]) -> str:
    """Every stage's model beside the others; "" before any was evaluated."""
    cells: dict[str, dict[str, float]] = {}
    for stage in stages.STAGES:
        scores: list[tuple[str, Any]] = [
            ("validation bpb", record.get("bpb"))
            for record in _series(runs.get(stage.name, []), "eval")
        ]
        for name in (stage.name, *(script for script, _ in stage.evaluations)):
            scores += [("CORE", record.get("core")) for record in runs.get(name, [])]
        for record in runs.get(stage.chat_evaluation, []):
            if record.get("kind") == "task":
                scores.append((str(record.get("task")), record.get("accuracy")))
            scores.append(("ChatCORE", record.get("chatcore")))
        for row, score in scores:
            if _is_number(score):
                cells.setdefault(row, {})[stage.column] = score
    if not cells:
        return ""
    columns = [stage.column for stage in stages.STAGES]
    rows = [(row, *(found.get(c, "-") for c in columns)) for row, found in cells.items()]
    return "## Summary\n\n" + table(["", *columns], rows)


def _wall_clock(runs: Mapping[str, list[Record]]) -> str:
    rows = []
    for stage, records in runs.items():
        measured = _merged(records, "end").get("wall_seconds")
        seconds = measured if _is_number(measured) else _time(records[-1]) - _time(records[0])
        rows.append((stages.title_of(stage), seconds))
    rows.append(("total", sum(seconds for _, seconds in rows)))
    cells = [(title, f"{seconds / 60:.1f}") for title, seconds in rows]
    return "## Wall clock\n\n" + table(["stage", "minutes"], cells)


def _series(records: list[Record], kind: str) -> list[Record]:
    """Records of a kind in order of steps, the last written of each step."""
    by_step = {r["step"]: r for r in records if r.get("kind") == kind and _is_number(r.get("step"))}
    return [by_step[step] for step in sorted(by_step)]


def _last_step(records: list[Record]) -> list[Record]:
    return [record for record in records if record.get("step") == records[-1].get("step")]


def _merged(records: list[Record], kind: str) -> Record:
    merged: Record = {}
    for record in records:
        if record.get("kind") == kind:
            merged.update(record)
    return merged


def _median(records: list[Record], key: str) -> float | None:
    values = sorted(r[key] for r in records if _is_number(r.get(key)))
    return values[len(values) // 2] if values else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _time(record: Record) -> float:
    """Seconds since the epoch; 0 where a record does not tell."""
    value = record.get("time")
    if _is_number(value):
        return float(value)  # pyright: ignore[reportArgumentType]
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return 0.0


if __name__ == "__main__":
    command.run(main)
