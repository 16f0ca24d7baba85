"""What mid-training and fine-tuning train on: recipes, with the number of rows of each part.

full    data sets of the Hugging Face Hub, or their files in a local folder
local   only what comes with the code: who the model is, spelling, arithmetic with the calculator

Nothing that is evaluated is trained on: no training mixture contains a test split, or a task that
is for evaluation only. The test mixtures are for the validation loss.
"""

from pathlib import Path

from nanochat.settings import require_known
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import Task, TaskMixture
from tasks.customjson import identity
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, load_words

MIXTURES = ("full", "local")
# There are few ways to ask about one word: more problems per word than this mostly repeat others.
PROBLEMS_PER_WORD = 20


def mid_mixture(mixture: str, split: str, task_data: Path | str = "") -> TaskMixture:
    """Conversations of mid-training. The full training mixture has 848 thousand (with the word
    list of docs/adding_a_task.md; fewer spelling problems with the words that come with the code).

    split   train or test
    Raises  ValueError for an unknown mixture or split, or missing files.
    """
    _check(mixture, split)
    if mixture == "local":
        return _local_mixture(
            split, task_data, spelling=4000, counting=3000, sums=6000, identities=20
        )
    if split == "test":
        mmlu, gsm8k = MMLU("test", task_data)[:5200], GSM8K("test", task_data)[:420]
        return TaskMixture([SmolTalk("test", task_data), mmlu, gsm8k])
    most = PROBLEMS_PER_WORD * len(load_words("train", task_data))
    return TaskMixture(
        [
            SmolTalk("train", task_data),  # 460 thousand: how a conversation goes
            MMLU("auxiliary_train", task_data),  # 100 thousand: how to answer multiple choice
            GSM8K("train", task_data),  # 7 thousand: how to call the calculator
            identity(task_data),  # few conversations, so twice
            identity(task_data),
            SimpleSpelling("train", task_data, size=min(200_000, most)),
            SpellingBee("train", task_data, size=min(80_000, most)),
        ]
    )


def sft_mixture(mixture: str, split: str, task_data: Path | str = "") -> TaskMixture:
    """Conversations of fine-tuning. The full training mixture has 23 thousand.

    split   train or test
    Raises  ValueError for an unknown mixture or split, or missing files.
    """
    _check(mixture, split)
    if mixture == "local":
        return _local_mixture(split, task_data, spelling=300, counting=300, sums=300, identities=4)
    if split == "test":
        return TaskMixture([SmolTalk("test", task_data)])
    return TaskMixture(
        [
            ARC("ARC-Easy", "train", task_data),
            ARC("ARC-Challenge", "train", task_data),
            GSM8K("train", task_data),
            SmolTalk("train", task_data)[:10_000],
            identity(task_data),
            SimpleSpelling("train", task_data, size=300),
            SpellingBee("train", task_data, size=300),
        ]
    )


def _check(mixture: str, split: str) -> None:
    require_known("mixture", mixture, MIXTURES)
    require_known("split", split, ("train", "test"))


def _local_mixture(
    split: str, task_data: Path | str, spelling: int, counting: int, sums: int, identities: int
) -> TaskMixture:
    tasks: list[Task] = [
        SimpleSpelling(split, task_data, size=spelling if split == "train" else 256),
        SpellingBee(split, task_data, size=counting if split == "train" else 256),
        Arithmetic(split, size=sums if split == "train" else 256),
    ]
    if split == "train":
        tasks += [identity(task_data)] * identities
    return TaskMixture(tasks)
