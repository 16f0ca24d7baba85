"""The pictures of the front page, from a finished `bash dev/runcpu.sh`.

    python -m dev.pictures --base_dir=DIR    writes docs/images/cpu_run.png and docs/images/chat.svg

The curves come from the records of the run, the chat from its newest model, answering greedily.
"""

import argparse
import html
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nanochat.serve.terminal import Printer
from nanochat.tracking import read_records

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
PROMPTS = (
    "Who are you?",
    "How many r are in strawberry?",
    "What is 347 plus 589?",
    "What is the capital of France?",
    "Why is the sky blue?",
)
COLUMNS, CHARACTER, LINE = 92, 8.43, 21  # of the terminal; pixels at a font size of 14


def runs(base_dir: Path, tag: str) -> list[list[dict[str, Any]]]:
    """The records of each stage that left a model, in the order in which the stages ran."""
    found = [read_records(path) for path in base_dir.glob(f"*_checkpoints/{tag}/metrics.jsonl")]
    return sorted(found, key=lambda records: records[0]["time"])


def draw_curves(stages: list[list[dict[str, Any]]], path: Path) -> None:
    """Training loss over the steps of all stages, and the accuracy of each stage's model."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2, width_ratios=(3, 2))
    first_step = 0
    scores: dict[str, dict[str, float]] = {}
    for records in stages:
        stage = records[0]["stage"]
        steps = [r for r in records if r["kind"] == "train" and r["stage"] == stage]
        if "reward" not in steps[-1]:  # the loss of a policy gradient is on another scale
            where = [first_step + r["step"] for r in steps]
            (line,) = losses.plot(where, [r["loss"] for r in steps], alpha=0.35, linewidth=0.8)
            smooth = [r["smooth_loss"] for r in steps]
            losses.plot(where, smooth, color=line.get_color(), label=f"{stage}, {len(steps)} steps")
            first_step = where[-1]
        for r in records:
            if r["kind"] == "task":
                scores.setdefault(r["task"], {})[stage] = 100 * r["accuracy"]
    losses.set(xlabel="optimizer step", ylabel="training loss, nats per token", ylim=(0, None))
    losses.legend()
    evaluated = {stage for by_stage in scores.values() for stage in by_stage}
    names = [r[0]["stage"] for r in stages if r[0]["stage"] in evaluated]
    for i, (task, by_stage) in enumerate(sorted(scores.items())):
        width = 0.8 / len(scores)
        where = [x + (i - (len(scores) - 1) / 2) * width for x in range(len(names))]
        bars = accuracies.bar(where, [by_stage.get(n, 0) for n in names], width, label=task)
        accuracies.bar_label(bars, fmt="%.0f", fontsize=8)
    accuracies.set(xticks=range(len(names)), ylabel="test problems solved, %", ylim=(0, 108))
    accuracies.set_xticklabels(names)
    accuracies.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(scores), frameon=False)
    figure.savefig(path, dpi=100)


def answers(base_dir: Path, checkpoint: str) -> list[tuple[str, str]]:
    """Each prompt with what scripts.chat_cli prints as its answer, each in a new conversation."""
    flags = [f"--checkpoint={checkpoint}", "--device=cpu", "--temperature=0", "--max_tokens=120"]
    said = subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", "--json", *flags],
        cwd=ROOT,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)},
        input="\n/clear\n".join(PROMPTS) + "\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = [json.loads(line)["content"] for line in said.splitlines()]
    return list(zip(PROMPTS, map(as_shown, found), strict=True))


def as_shown(content: str | list[dict[str, str]]) -> str:
    """An answer as the terminal shows it, with the calls of its tool."""
    pieces: list[str] = []
    printer = Printer(pieces.append)
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        printer.show(part["type"], part["text"])
    printer.finish()
    return "".join(pieces).strip()


def draw_chat(chat: list[tuple[str, str]], path: Path) -> None:
    """The conversation as a terminal shows it."""
    lines: list[tuple[str, str]] = []
    for prompt, answer in chat:
        lines.append(("#7ee787", f"user: {prompt}"))
        for part in f"assistant: {answer}".splitlines():
            lines += [("#e6edf3", line) for line in textwrap.wrap(part, COLUMNS) or [""]]
        lines.append(("", ""))
    width, height = round(COLUMNS * CHARACTER + 40), len(lines) * LINE + 20
    texts = [
        f'<text x="20" y="{30 + i * LINE}" fill="{colour}">{html.escape(line)}</text>'
        for i, (colour, line) in enumerate(lines)
        if line
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" font-size="14" '
        f'viewBox="0 0 {width} {height}" '
        'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace">'
    )
    box = f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>'
    path.write_text("\n".join([head, box, *texts, "</svg>", ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.pictures", description="Pictures of the front page.")
    parser.add_argument("--base_dir", type=Path, required=True, help="NANOCHAT_BASE_DIR of the run")
    parser.add_argument("--tag", default="cpu_small", help="folder of the run's checkpoints")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    stages = runs(options.base_dir, options.tag)
    draw_curves(stages, IMAGES / "cpu_run.png")
    newest = f"{stages[-1][0]['stage']}_checkpoints/{options.tag}/latest.pt"
    draw_chat(answers(options.base_dir, newest), IMAGES / "chat.svg")


if __name__ == "__main__":
    main()
