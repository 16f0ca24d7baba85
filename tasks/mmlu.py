"""MMLU: multiple-choice questions on 57 subjects, from school to profession (arXiv:2009.03300).

A sample problem of the same form:

    >>> from nanochat.text.chat_format import conversation_text
    >>> from tasks.mmlu import MMLU
    >>> task = MMLU("test", "tests/tasks/fixtures", subjects=("anatomy",))
    >>> print(conversation_text(task[0]))
    <|bos|><|user_start|>Multiple Choice question: Which gas do we need to breathe?
    - oxygen=A
    - helium=B
    - neon=C
    - argon=D
    <BLANKLINE>
    Respond only with the letter of the correct answer.<|user_end|>
    <|assistant_start|>A<|assistant_end|>
    >>> task[0]["subject"], task.evaluate(task[0], "A"), task.reward(task[0], "C")
    ('anatomy', True, 0.0)
"""

from collections.abc import Sequence
from pathlib import Path

from nanochat.settings import near_miss
from nanochat.text.chat_format import Conversation
from tasks.common import Task, multiple_choice
from tasks.registry import TaskEntry
from tasks.rows import Row
from tasks.sources import DatasetTask, Source

LETTERS = ("A", "B", "C", "D")


class MMLU(DatasetTask):
    """Questions with four choices; conversation["subject"] is the subject.

    split     auxiliary_train (questions of other data sets, without a subject), dev, validation,
              test
    subjects  only these; empty is all
    Raises    ValueError for an unknown split or subject, or missing files.
    """

    eval_type = "categorical"
    source = Source(
        repository="cais/mmlu",
        revision="c30699e8356da336a370243923dbaf21066bb9fe",
        places=("mmlu/all", "mmlu"),
        splits=("auxiliary_train", "dev", "validation", "test"),
        columns=("question", "subject", "choices", "answer"),
    )

    def __init__(
        self,
        split: str,
        task_data: Path | str = "",
        subjects: Sequence[str] = (),
        **view: int | None,
    ) -> None:
        super().__init__(split, task_data)
        if subjects:
            subject_of = [row["subject"] for row in self.rows]
            known = set(subject_of)
            for subject in subjects:
                if subject not in known:
                    raise ValueError(f"unknown subject {subject!r}{near_miss(subject, known)}")
            self.order = [i for i in self.order if subject_of[i] in subjects]
        # the view selects among the chosen subjects' questions, not among all
        Task.__init__(self, len(self.order), **view)

    def conversation(self, row: Row) -> Conversation:
        right = LETTERS[row["answer"]]
        conversation = multiple_choice(row["question"], LETTERS, row["choices"], right)
        return conversation | {"subject": row["subject"]}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]


TASKS = (
    TaskEntry(
        "MMLU",
        MMLU,
        guessing=1 / len(LETTERS),
        in_chatcore=True,
        in_sft_tests=True,
        source=MMLU.source,
    ),
)
