"""ARC: multiple-choice questions of school science, easy and challenge (arXiv:1803.05457)."""

from pathlib import Path

from nanochat.text.chat_format import Conversation
from tasks.common import Task, multiple_choice, shuffled
from tasks.sources import Source

SUBSETS = ("ARC-Easy", "ARC-Challenge")


class ARC(Task):
    """Questions with three to five choices, whose letters are those of the data set.

    subset  ARC-Easy or ARC-Challenge
    split   train, validation or test
    Raises  ValueError for an unknown subset or split, or where files are missing.
    """

    eval_type = "categorical"

    def __init__(
        self, subset: str, split: str, task_data: Path | str = "", **view: int | None
    ) -> None:
        if subset not in SUBSETS:
            raise ValueError(f"subset {subset!r} is unknown; choose {' or '.join(SUBSETS)}")
        source = Source(
            repository="allenai/ai2_arc",
            revision="210d026faf9955653af8916fad021475a3f00453",
            places=(f"arc/{subset}", subset.lower().replace("-", "_")),
            splits=("train", "validation", "test"),
            columns=("question", "choices", "answerKey"),
        )
        self.rows = source.load(split, task_data)
        self.order = shuffled(len(self.rows))
        super().__init__(len(self.rows), **view)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[self.order[index]]
        letters, choices = row["choices"]["label"], row["choices"]["text"]
        return multiple_choice(row["question"], letters, choices, row["answerKey"])

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]
