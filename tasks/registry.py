"""The table of tasks: every module of this folder that declares `TASKS` is in it.

A task is declared once, at the end of its own file:

    TASKS = (TaskEntry("GSM8K", GSM8K, source=SOURCE, in_chatcore=True, has_reward=True),)

From these entries come the names that chat_eval and chat_rl accept and show in --help, the tasks
and guessing baselines of ChatCORE, the tests during fine-tuning, and the table in
docs/adding_a_task.md. Nothing else lists tasks, except a mixture (tasks/mixtures.py), which is a
recipe: which data, how many rows of each.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tasks
from nanochat.settings import near_miss
from tasks.common import Task
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
    """

    name: str
    task: type[Task]
    splits: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    guessing: float = 0.0
    in_chatcore: bool = False
    has_reward: bool = False
    in_sft_tests: bool = False
    source: Source | None = None

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
    """The entry of this name.

    Raises  ValueError naming the nearest name if there is none.
    """
    known = entries()
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
    entry = find_entry(name)
    make = cast(Callable[..., Task], entry.task)  # subclasses take more than Task itself
    return make(*entry.arguments, split, task_data or "", **options)


def get_evaluated_task(
    name: str, task_data: Path | str | None = None, allow_weaker_sandbox: bool = False
) -> Task:
    """The test split of a task that has right answers, for a script to evaluate.

    allow_weaker_sandbox  of a task whose answers are programs
    Raises  ValueError as `get_task`, or for a task that is only trained on.
    """
    if find_entry(name).task.eval_type == "none":
        choices = ", ".join(evaluated_names())
        raise ValueError(f"{name} has no right answers to compare with; choose among {choices}")
    return get_task(name, "test", task_data, **_sandbox(name, allow_weaker_sandbox))


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
    if not find_entry(name).has_reward:
        choices = ", ".join(rewarded_names())
        raise ValueError(f"{name} has no reward to learn from; choose among {choices}")
    return get_task(name, split, task_data, **_sandbox(name, allow_weaker_sandbox))


def _sandbox(name: str, allow_weaker_sandbox: bool) -> dict[str, bool]:
    """The option of a task whose answers are programs."""
    runs_code = find_entry(name).task.runs_code
    return {"allow_weaker_sandbox": allow_weaker_sandbox} if runs_code else {}


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
