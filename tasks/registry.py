"""The table of tasks: every module of this folder that declares `TASKS` is in it.

A task is declared once, at the end of its own file:

    TASKS = (TaskEntry("GSM8K", GSM8K, source=SOURCE, in_chatcore=True, has_reward=True),)

From these entries come the names that chat_eval and chat_rl accept and show in --help, the tasks
and guessing baselines of ChatCORE, the tests during fine-tuning, and the table in
docs/adding_a_task.md. Nothing else lists tasks, except a mixture (tasks/mixtures.py), which is a
recipe: which data, how many rows of each.

The name of a file of problems, or of a data set of the Hub, is a task too (tasks/file_task.py).
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tasks
from nanochat.settings import near_miss
from tasks.common import Task
from tasks.file_rows import names_rows, short_name
from tasks.file_task import read_task
from tasks.sources import Source


@dataclass(frozen=True)
class TaskEntry:
    """What everyone else needs to know about a task.

    name          in --task_name, --task, records and reports
    task          its class; called as task(*arguments, split, task_data, **options)
    splits        that it has, those of its source where there is one; evaluation uses "test",
                  reinforcement learning trains on "train"
    arguments     before the split, where one class serves several tasks
    guessing      accuracy of a model that knows nothing: 1 / choices, or 0 for free answers
    in_chatcore   whether ChatCORE averages over it
    has_reward    whether reinforcement learning can train on `reward`
    in_sft_tests  whether chat_sft tests it while it trains
    source        where its rows come from; None for problems made by the code
    evaluated_split  "test", but of a file all its problems
    """

    name: str
    task: type[Task]
    splits: tuple[str, ...] = ()
    arguments: tuple[Any, ...] = ()
    guessing: float = 0.0
    in_chatcore: bool = False
    has_reward: bool = False
    in_sft_tests: bool = False
    source: Source | None = None
    evaluated_split: str = "test"

    def __post_init__(self) -> None:
        if self.source is not None:
            object.__setattr__(self, "splits", self.source.splits)
        assert 0 <= self.guessing < 1, self
        if self.in_chatcore or self.in_sft_tests:
            assert self.task.eval_type != "none", f"{self.name} cannot be evaluated"
            assert "test" in self.splits, f"{self.name} has no test split"
        if self.has_reward:
            assert self.task.eval_type == "generative", f"{self.name}: rewards need free answers"
            assert not self.task.evaluation_only, f"{self.name} must not be trained on"
            assert "train" in self.splits, f"{self.name} has no train split"


def entries() -> dict[str, TaskEntry]:
    """Every task by name, in the order of their files."""
    found: dict[str, TaskEntry] = {}
    for module in pkgutil.iter_modules(tasks.__path__, "tasks."):
        for entry in getattr(importlib.import_module(module.name), "TASKS", ()):
            assert entry.name not in found, f"two tasks are called {entry.name}"
            found[entry.name] = entry
    return found


def find_entry(name: str) -> TaskEntry:
    """The entry of this name, or of a file or data set of this name.

    Raises  ValueError naming the nearest name if there is none, or what is wrong with the file.
    """
    known = entries()
    if name not in known and names_rows(name):
        if (short := short_name(name)) in known:
            raise ValueError(f"{name} would be reported as the task {short}; rename the file")
        file = read_task(name)
        rewarded = file.kind.eval_type == "generative"
        splits = ("all", "train", "test")
        return TaskEntry(
            short, file.kind, splits, (file,), has_reward=rewarded, evaluated_split="all"
        )
    if name not in known:
        same = [other for other in known if other.lower() == name.lower()]
        hint = f"; did you mean {same[0]!r}?" if same else near_miss(name, known)
        raise ValueError(f"unknown task {name!r}{hint}")
    return known[name]


def get_task(
    name: str, split: str = "test", task_data: Path | str | None = None, **options: Any
) -> Task:
    """The task of this name.

    task_data  folder to read from; None or empty downloads from the Hub
    options    further arguments of the task, such as subjects=("anatomy",) or stop=100
    Raises     ValueError for an unknown name or split, or missing files.
    """
    return _make(find_entry(name), split, task_data, **options)


def _make(entry: TaskEntry, split: str, task_data: Path | str | None, **options: Any) -> Task:
    make = cast(Callable[..., Task], entry.task)  # subclasses take more than Task itself
    return make(*entry.arguments, split, task_data or "", **options)


def get_evaluated_task(
    name: str, task_data: Path | str | None = None, allow_weaker_sandbox: bool = False
) -> Task:
    """The test split of a task that has right answers, or all of a file, for a script to evaluate.

    allow_weaker_sandbox  of a task whose answers are programs
    Raises  ValueError as `get_task`, or for a task that is only trained on.
    """
    entry = find_entry(name)
    if entry.task.eval_type == "none":
        choices = ", ".join(evaluated_names())
        raise ValueError(f"{name} has no right answers to compare with; choose among {choices}")
    return _make(entry, entry.evaluated_split, task_data, **_sandbox(entry, allow_weaker_sandbox))


def get_evaluated_tasks(
    names: Sequence[str], task_data: Path | str | None = None, allow_weaker_sandbox: bool = False
) -> dict[str, Task]:
    """Tasks by the names that records have for them: of a file, its stem.

    Raises  ValueError as `get_evaluated_task`, or for two tasks of one name.
    """
    found: dict[str, Task] = {}
    for name in names:
        short = record_name(name)
        if short in found:
            raise ValueError(f"two of {'|'.join(names)} are called {short}; rename a file")
        found[short] = get_evaluated_task(name, task_data, allow_weaker_sandbox)
    return found


def get_rewarded_task(
    name: str,
    split: str,
    task_data: Path | str | None = None,
    allow_weaker_sandbox: bool = False,
) -> Task:
    """A task for reinforcement learning.

    allow_weaker_sandbox  of a task whose answers are programs
    Raises  ValueError as `get_task`, or for a task without a usable reward.
    """
    entry = find_entry(name)
    if not entry.has_reward:
        choices = ", ".join(rewarded_names())
        raise ValueError(f"{name} has no reward to learn from; choose among {choices}")
    return _make(entry, split, task_data, **_sandbox(entry, allow_weaker_sandbox))


def _sandbox(entry: TaskEntry, allow_weaker_sandbox: bool) -> dict[str, bool]:
    """The option of a task whose answers are programs."""
    return {"allow_weaker_sandbox": allow_weaker_sandbox} if entry.task.runs_code else {}


def record_name(name: str) -> str:
    """What records call the task that a user names."""
    return short_name(name) if name not in entries() and names_rows(name) else name


def evaluated_names() -> list[str]:
    """Tasks that chat_eval accepts."""
    return [name for name, entry in entries().items() if entry.task.eval_type != "none"]


def rewarded_names() -> list[str]:
    """Tasks that chat_rl accepts."""
    return [name for name, entry in entries().items() if entry.has_reward]


def sft_test_names() -> list[str]:
    """Tasks that chat_sft tests while it trains."""
    return [name for name, entry in entries().items() if entry.in_sft_tests]


def chatcore_baselines() -> dict[str, float]:
    """Guessing accuracy of each task that ChatCORE averages over."""
    return {name: entry.guessing for name, entry in entries().items() if entry.in_chatcore}
