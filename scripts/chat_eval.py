"""Accuracy of a chat model on its tasks, and ChatCORE over all of them.

python -m scripts.chat_eval --checkpoint=chatsft_checkpoints/latest.pt
torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -i mid -a "GSM8K|my_task.jsonl"
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from nanochat import command, configurator
from nanochat.common import print0
from nanochat.eval.tasks import chatcore, evaluate_categorical, evaluate_generative
from nanochat.infer.sampling import SamplingSettings
from nanochat.serve.chat_model import ChatModel, ChatSettings, load_chat_model
from nanochat.settings import Choices, Count, CountOrZero, NonNegative, Seed
from nanochat.tracking import Tracker, write_json
from tasks.common import Task
from tasks.file_rows import FILE_OF_PROBLEMS, names_rows
from tasks.registry import chatcore_baselines, evaluated_names, get_evaluated_tasks

Names = Choices(evaluated_names, "|", names_rows, FILE_OF_PROBLEMS)
TaskNames = Annotated[str, Names, tyro.conf.arg(aliases=["-a"])]


@dataclass(frozen=True)
class Settings(ChatSettings):
    """Evaluate a chat model; tasks that were evaluated before with these settings are kept."""

    task_name: TaskNames = ""  # empty is the tasks of ChatCORE
    task_data: str = ""  # folder of local task files instead of the Hugging Face Hub
    temperature: Annotated[NonNegative, tyro.conf.arg(aliases=["-t"])] = 0.0  # of free answers
    top_k: Annotated[CountOrZero, tyro.conf.arg(aliases=["-k"])] = 50  # likeliest tokens; 0 is all
    num_samples: Annotated[Count, tyro.conf.arg(aliases=["-n"])] = 1  # answers to each problem
    max_new_tokens: Annotated[Count, tyro.conf.arg(aliases=["-m"])] = 512  # longest answer
    batch_size: Annotated[Count, tyro.conf.arg(aliases=["-b"])] = 8  # problems of one forward pass
    max_problems: Annotated[CountOrZero, tyro.conf.arg(aliases=["-x"])] = 0  # of each; 0 is all
    fresh: bool = False  # evaluate again what was evaluated before
    allow_weaker_sandbox: bool = False  # run answers that are programs without every barrier
    seed: Seed = 42  # of sampled answers


def main() -> None:
    settings = configurator.load(Settings)
    names = settings.task_name.split("|") if settings.task_name else list(chatcore_baselines())
    tasks = get_evaluated_tasks(names, settings.task_data, settings.allow_weaker_sandbox)
    for task in tasks.values():
        task.ready()
    chat = load_chat_model(settings, settings.seed)
    runtime, tokenizer, model, meta = chat.runtime, chat.tokenizer, chat.model, chat.meta
    engine = chat.engine(num_slots=settings.batch_size * settings.num_samples)
    sampling = SamplingSettings(settings.temperature, settings.top_k, seed=settings.seed)
    tracker = Tracker(
        chat.path.parent,
        runtime,
        chat.stage.chat_evaluation,
        settings,
        header={"checkpoint": str(chat.path)},
    )
    results = Results(runtime.base_dir / "chat_eval", chat, settings)
    for task_name, task in tasks.items():
        if not results.has(task_name, task):
            started = time.perf_counter()
            if task.eval_type == "categorical":
                accuracy = evaluate_categorical(
                    model, tokenizer, task, runtime, settings.batch_size, settings.max_problems
                )
                passed: dict[str, float] = {}
            else:
                accuracy, passed = evaluate_generative(
                    engine,
                    task,
                    runtime,
                    sampling,
                    settings.max_new_tokens,
                    settings.num_samples,
                    settings.max_problems,
                )
            values = {"accuracy": accuracy.accuracy, **asdict(accuracy), **passed}
            if task.digest:
                values["digest"] = task.digest
            results.add(task_name, values | {"seconds": time.perf_counter() - started}, runtime)
        tracker.log("task", meta["step"], task=task_name, **results.tasks[task_name])
        print0(f"{task_name:14} {line(results.tasks[task_name])}")
    accuracies = {name: results.tasks[name]["accuracy"] for name in tasks}
    score = chatcore(accuracies, chatcore_baselines())
    if score is not None:
        tracker.log("chatcore", meta["step"], chatcore=score, tasks=list(tasks))
        print0(f"ChatCORE {score:.4f} over {', '.join(tasks)}")
    tracker.close()
    runtime.close()


def line(values: dict[str, Any]) -> str:
    """One task's result for the console."""
    passed = " ".join(f"{key} {value:.4f}" for key, value in values.items() if "@" in key)
    return (
        f"accuracy {values['accuracy']:.4f} ({values['num_right']:,} of {values['num_problems']:,}"
        f", {values['num_too_long']} too long) {passed}"
    )


class Results:
    """Results with the same settings and weights, kept in a JSON file that grows task by task."""

    def __init__(self, folder: Path, chat: ChatModel, settings: Settings) -> None:
        stage_name, tag, step = chat.path.parts[-3:]
        self.path = folder / f"{stage_name.removesuffix('_checkpoints')}_{tag}_{step}.json"
        # settings that do not change a result
        ignored = ("task_name", "fresh", "batch_size", "device", "kernels", "verbose", "checkpoint",
                   "allow_weaker_sandbox")  # fmt: skip
        self.key = {k: v for k, v in asdict(settings).items() if k not in ignored}
        # --source is only a default: a checkpoint's path can name another stage
        self.key["source"] = chat.stage.source
        self.key["weights"] = chat.meta["files"]["model.pt"]["sha256"]
        self.tasks: dict[str, dict[str, Any]] = {}
        if self.path.is_file() and not settings.fresh:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["settings"] == self.key:
                self.tasks = saved["tasks"]

    def has(self, name: str, task: Task) -> bool:
        """Whether the task was evaluated, with the problems that its file has now."""
        return name in self.tasks and self.tasks[name].get("digest", "") == task.digest

    def add(self, name: str, values: dict[str, Any], runtime: Any) -> None:
        """Keep one task's result; the file is replaced atomically."""
        self.tasks[name] = values
        if runtime.is_main:
            write_json(self.path, {"settings": self.key, "tasks": self.tasks})


if __name__ == "__main__":
    command.run(main)
