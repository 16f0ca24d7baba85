"""Tables and a plot of a comparison.

    python -m experiments.mxfp4.studies.report DIR

writes DIR/report.md and DIR/delta_bpb.png from the JSON files in DIR. A difference is taken between
two cells of one seed, recipe minus baseline; its standard error is over the seeds. Speed is given
only for cells whose products were native.

Why pairs: three seeds of the baseline may end at 1.0, 2.0 and 3.0 bpb, those of a recipe at 1.11,
2.09 and 3.10. The means, 2.0 +- 0.6 and 2.1 +- 0.6, say nothing; the differences 0.11, 0.09, 0.10
say 0.10 +- 0.006, which is 17 standard errors where 4.3 are needed.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.mxfp4.numbers.formats import FORMATS
from experiments.mxfp4.studies.cells import GROUPS
from nanochat import command
from nanochat.report import table

BASELINE = "plain"
# two-sided 95 % points of Student's t by degrees of freedom; from 10 on, that of the normal
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
T_NORMAL = 1.96
CONVERGED = 10  # tokens a parameter: half of Chinchilla's, arXiv:2203.15556

Cell = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """Validation bpb of a recipe minus the baseline's, in pairs of one seed.

    error  standard error of the mean; NaN for a single seed
    """

    mean: float
    error: float
    seeds: int

    @property
    def significant(self) -> bool:
        """Whether it differs from zero at 95 %, by a two-sided t-test."""
        limit = T_95.get(self.seeds - 1, T_NORMAL)
        return self.seeds > 1 and abs(self.mean) > limit * self.error

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} +- {self.error:.4f}"


def read_cells(folder: Path) -> list[Cell]:
    """Every cell of a folder. Raises ValueError for none, and for cells of two comparisons."""
    paths = sorted(folder.glob("*_seed*.json"))
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not cells:
        raise ValueError(
            f"{folder} holds no cells; make some with experiments.mxfp4.studies.compare"
        )
    for name in ("settings", "vocab_size", "dtype"):
        for cell, path in zip(cells, paths, strict=True):
            if cell[name] != cells[0][name]:
                raise ValueError(f"{path} and {paths[0]} differ in {name}: not one comparison")
    return cells


def by_name(cells: Sequence[Cell]) -> dict[str, dict[int, Cell]]:
    """Name -> seed -> cell."""
    found: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        found.setdefault(cell["cell"], {})[cell["seed"]] = cell
    return found


def difference(cells: Mapping[int, Cell], baseline: Mapping[int, Cell]) -> Difference | None:
    """Over the seeds that both have; None if there are none."""
    pairs = [cells[seed]["bpb"] - baseline[seed]["bpb"] for seed in cells if seed in baseline]
    if not pairs:
        return None
    error = stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return Difference(fmean(pairs), error, len(pairs))


def row(
    name: str, cells: Mapping[int, Cell], baseline: Mapping[int, Cell], timed: bool
) -> tuple[object, ...]:
    """A line of a table; `timed` adds the speed of cells that are not emulated."""
    first = next(iter(cells.values()))
    delta = difference(cells, baseline)
    products = first["products"]
    quantized = [p and p.split(" | ")[0] for p in products.values()]
    # leave out what goes without saying: rounding to nearest, and the scale mode that nvfp4 ignores
    formats = [
        (text or "-").replace(" nearest", "").replace("nvfp4 even", "nvfp4") for text in quantized
    ]
    if first.get("quest"):
        formats[0] = "mxfp4 QuEST hadamard"
    transformed = any("hadamard" in (text or "") for text in quantized[1:])
    signs = ""
    if transformed:
        signs = f", {'no' if first['signs'] == 'none' else first['signs']} signs"
    path = {"native": "native", "emulate": "emulated"}.get(first["path"], first["path"])
    low = sum(v for kind, v in first["flop_shares"].items() if kind.startswith(tuple(FORMATS)))
    speed = ""
    if timed and first["path"] != "emulate":
        speed = f"{fmean(c['tokens'] / c['seconds'] for c in cells.values()):,.0f}"
    bpb = fmean(cell["bpb"] for cell in cells.values())
    shown = "" if delta is None or name == BASELINE else str(delta)
    mark = " *" if delta is not None and delta.significant and name != BASELINE else ""
    return (name, path, *formats[:2], formats[2] + signs, f"{low:.0%}", f"{bpb:.4f}",
            shown + mark, len(cells), speed)  # fmt: skip


def facts(cells: Sequence[Cell]) -> list[str]:
    """Sizes, tokens, seeds and hardware that the numbers come from."""
    first, s = cells[0], cells[0]["settings"]
    machine = first["environment"]["hardware"]
    hardware = ", ".join(gpu["name"] for gpu in machine["gpus"]) or (
        f"{machine['cpu']}, {first['threads']} thread"
    )
    seeds = sorted({cell["seed"] for cell in cells})
    commits = {
        f"{str(each['commit'])[:12]}{' and changes' if each['dirty'] else ''}"
        for each in (cell["environment"] for cell in cells)
    }
    batch = s["device_batch_size"] * s["micro_batches"]
    return [
        f"- Model: depth {s['depth']}, {first['num_params']:,} parameters, context "
        f"{s['max_seq_len']}, {first['vocab_size']:,} tokens of vocabulary, {first['dtype']} "
        "activations; embedding, head and attention are not quantized.",
        f"- Training: {first['tokens']:,} tokens of {s['data_dir'] or s['dataset']}, "
        f"{s['num_iterations']} steps of {batch * s['max_seq_len']:,} tokens, Muon and AdamW; "
        f"{s['eval_tokens']:,} validation tokens; seeds {', '.join(map(str, seeds))}.",
        f"- Hardware: {hardware}; torch {first['environment']['torch']}; commit "
        f"{', '.join(sorted(commits))}.",
    ]


def verdict(named: Mapping[str, Mapping[int, Cell]]) -> str:
    """What can be concluded, given the standard errors."""
    baseline = named[BASELINE]
    pairs = ((name, difference(cells, baseline)) for name, cells in named.items())
    deltas = {name: d for name, d in pairs if d is not None and name != BASELINE}
    if not deltas:
        return "Only the baseline is here."
    if max(d.seeds for d in deltas.values()) < 2:
        return "**One seed has no standard error**: this table tells no recipe from another."
    first = next(iter(baseline.values()))
    ratio = first["tokens"] / first["num_params"]
    scale = ""
    if ratio < CONVERGED:
        scale = (
            f" **At {ratio:.2g} tokens a parameter the table does not rank recipes**: a run this "
            "short is far from converged, and whatever changes its steps moves it either way. A "
            "difference below zero is no gain of fewer bits."
        )
    apart = [name for name, d in deltas.items() if d.significant]
    if not apart:
        return f"No row can be told from the baseline at 95 %.{scale}"
    return (
        f"{len(apart)} of {len(deltas)} rows differ from the baseline at 95 % (marked *): "
        f"{', '.join(apart)}; about {0.05 * len(deltas):.1f} would by chance. Rows that are not "
        f"marked are not ranked.{scale}"
    )


COLUMNS = ("", "path", "fprop", "dgrad", "wgrad", "FLOPs in FP4/FP8", "bpb", "difference +- s.e.",
           "seeds", "tokens/s")  # fmt: skip


def markdown(cells: Sequence[Cell]) -> str:
    """The report. Raises ValueError if the baseline is missing."""
    named = by_name(cells)
    if BASELINE not in named:
        raise ValueError(f"no cell of {BASELINE!r}: there is nothing to compare with")
    baseline = named[BASELINE]
    timed = any(cell["path"] == "native" for cell in cells)
    parts = ["# Recipes at equal tokens and data order", "\n".join(facts(cells)), verdict(named)]
    for title, names in GROUPS.items():
        present = [name for name in names if name in named]
        if present:
            rows = [row(name, named[name], baseline, timed) for name in (BASELINE, *present)]
            parts.append(f"## {title[0].upper()}{title[1:]}\n\n" + table(COLUMNS, rows))
    parts.append(
        "bpb: bits per byte of the validation text. *: further from 0 than the 95 % point of "
        "Student's t. Emulated products compute the native numbers in another time: no speed."
    )
    return "\n\n".join(parts) + "\n"


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Differences with their 95 % intervals."""
    from matplotlib.figure import Figure

    named = by_name(cells)
    rows = {name: difference(own, named[BASELINE]) for name, own in named.items()}
    order = [name for names in GROUPS.values() for name in names if rows.get(name)]
    order = list(dict.fromkeys(order))[::-1]
    figure = Figure(figsize=(7, 0.6 + 0.26 * len(order)), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(order):
        d = rows[name]
        assert d is not None
        reach = T_95.get(d.seeds - 1, T_NORMAL) * d.error if d.seeds > 1 else 0.0
        axes.errorbar(d.mean, y, xerr=reach, fmt="o", color="C0", capsize=3)
    axes.set_yticks(range(len(order)), order)
    axes.axvline(0.0, color="0.6", linewidth=1)
    axes.set_xlabel("validation bpb minus the baseline's, 95 % interval over seeds")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1:
        raise SystemExit("usage: python -m experiments.mxfp4.studies.report DIR")
    folder = Path(arguments[0])
    cells = read_cells(folder)
    (folder / "report.md").write_text(markdown(cells), encoding="utf-8")
    plot(cells, folder / "delta_bpb.png")
    print(folder / "report.md")


if __name__ == "__main__":
    command.run(main)
