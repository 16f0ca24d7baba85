"""MMLU: multiple-choice questions of 57 subjects, from school to profession (arXiv:2009.03300)."""

from collections.abc import Sequence
from pathlib import Path

from nanochat.configurator import near_miss
from nanochat.text.chat_format import Conversation
from tasks.common import Task, multiple_choice, shuffled
from tasks.sources import Source

LETTERS = ("A", "B", "C", "D")
SOURCE = Source(
    repository="cais/mmlu",
    revision="c30699e8356da336a370243923dbaf21066bb9fe",
    places=("mmlu/all", "mmlu"),
    splits=("auxiliary_train", "dev", "validation", "test"),
    columns=("question", "subject", "choices", "answer"),
)


class MMLU(Task):
    """Questions with four choices; conversation["subject"] is the subject.

    split     auxiliary_train (other data sets' questions, without a subject), dev, validation, test
    subjects  only these; empty is all
    Raises    ValueError for an unknown split or subject, or where files are missing.
    """

    eval_type = "categorical"

    def __init__(
        self,
        split: str,
        task_data: Path | str = "",
        subjects: Sequence[str] = (),
        **view: int | None,
    ) -> None:
        self.rows = SOURCE.load(split, task_data)
        self.order = shuffled(len(self.rows))
        if subjects:
            subject_of = [row["subject"] for row in self.rows]
            known = set(subject_of)
            for subject in subjects:
                if subject not in known:
                    raise ValueError(f"unknown subject {subject!r}{near_miss(subject, known)}")
            self.order = [i for i in self.order if subject_of[i] in subjects]
        super().__init__(len(self.order), **view)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[self.order[index]]
        conversation = multiple_choice(
            row["question"], LETTERS, row["choices"], LETTERS[row["answer"]]
        )
        return conversation | {"subject": row["subject"]}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]
