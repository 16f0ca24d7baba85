"""CORE score of a base checkpoint: 22 in-context learning tasks.

python -m scripts.base_eval --checkpoint=base_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval --tasks=copa,piqa
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanochat import command, configurator, stages
from nanochat.common import Runtime, print0, setup_training
from nanochat.eval.core import centred, evaluate_task
from nanochat.eval.core_bundle import get_bundle, load_tasks
from nanochat.kernels.registry import format_choices, select
from nanochat.settings import Choices, Count, CountOrMinusOne, Device
from nanochat.text.tokenizer import get_tokenizer
from nanochat.tracking import Tracker
from nanochat.train import run


@dataclass(frozen=True)
class Settings:
    """Score a base checkpoint on CORE."""

    checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    model_tag: str = ""  # tag to look in when --checkpoint is empty or a step
    source: Annotated[str, Choices(stages.names)] = "base"  # stage of the checkpoint
    tasks: str = ""  # comma-separated labels; empty is all 22, which alone give a CORE score
    max_per_task: CountOrMinusOne = -1  # examples of each task, after shuffling; -1 is all
    bundle_dir: str = ""  # unpacked evaluation bundle; empty downloads it to the base directory
    bundle_sha256: str = ""  # of its archive; empty is that of the first download
    batch_tokens: Count = 32_768  # positions that pass the model together
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: Device = "auto"  # where to run; auto is CUDA, else MPS, else the CPU
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa
    verbose: bool = False  # print why each operation runs as it does


def main() -> None:
    settings = configurator.load(Settings)
    runtime = setup_training(settings.device)
    kernels = select(settings.kernels, runtime.device, runtime.dtype)
    print0(format_choices(kernels, settings.verbose))
    tokenizer = get_tokenizer(settings.tokenizer_dir or None)
    model, meta, path = run.load_pretrained(
        settings.checkpoint, settings.source, runtime, tokenizer, settings.model_tag
    )
    model.eval()
    bundle = Path(
        settings.bundle_dir or get_bundle(runtime.base_dir, sha256=settings.bundle_sha256)
    )
    tasks = load_tasks(bundle, settings.tasks)
    tracker = Tracker(path.parent, runtime, "base_eval", settings, header={"checkpoint": str(path)})
    rows = []
    for task in tasks:
        started = time.perf_counter()
        accuracy = evaluate_task(
            model, tokenizer, task, runtime, settings.batch_tokens, settings.max_per_task
        )
        score = centred(accuracy, task.guessing_percent)
        rows.append((task.label, accuracy, score))
        seconds = time.perf_counter() - started
        tracker.log(
            "task", meta["step"], task=task.label, accuracy=accuracy, centred=score, seconds=seconds
        )
        print0(f"{task.label:36} accuracy {accuracy:.4f} | centred {score:7.4f} | {seconds:.1f} s")
    mean = sum(score for _, _, score in rows) / len(rows)
    name = "core" if not settings.tasks else "mean_centred"
    tracker.log("core", meta["step"], max_per_task=settings.max_per_task, **{name: mean})
    print0(f"{name.replace('_', ' ')} {mean:.4f} over {len(rows)} tasks")
    write_csv(runtime, meta, [*rows, (name, None, mean)])
    tracker.close()
    runtime.close()


def write_csv(runtime: Runtime, meta: dict, rows: list[tuple[str, float | None, float]]) -> None:
    """<base dir>/base_eval/<tag>_<step>.csv: task, accuracy, centred."""
    if not runtime.is_main:
        return
    folder = runtime.base_dir / "base_eval"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{meta['tag']}_{meta['step']:06d}.csv"
    with output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "accuracy", "centred"))
        writer.writerows(rows)
    print(f"written: {output}")


if __name__ == "__main__":
    command.run(main)
