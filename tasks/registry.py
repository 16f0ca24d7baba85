"""Tasks by the names that evaluation knows them by."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nanochat.configurator import near_miss
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import Task
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee

TASKS: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {
        "ARC-Easy": partial(ARC, "ARC-Easy"),
        "ARC-Challenge": partial(ARC, "ARC-Challenge"),
        "MMLU": MMLU,
        "GSM8K": GSM8K,
        "HumanEval": HumanEval,
        "SpellingBee": SpellingBee,
        "Arithmetic": lambda split, _, **options: Arithmetic(split, **options),
    }
)


def get_task(
    name: str, split: str = "test", task_data: Path | str | None = None, **options: Any
) -> Task:
    """The task of this name.

    task_data  folder to read from; None or empty downloads from the Hub
    options    further arguments of the task, such as subjects=("anatomy",) or stop=100
    Raises     ValueError for an unknown name or split, or where files are missing.
    """
    if name not in TASKS:
        same = [known for known in TASKS if known.lower() == name.lower()]
        hint = f"; did you mean {same[0]!r}?" if same else near_miss(name, TASKS)
        raise ValueError(f"unknown task {name!r}{hint}")
    return TASKS[name](split, task_data or "", **options)
