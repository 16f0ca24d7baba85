"""ARC: multiple-choice questions from school science, easy and challenging (arXiv:1803.05457).

A sample problem of the same form:

    >>> from nanochat.text.chat_format import conversation_text
    >>> from tasks.arc import ARC
    >>> task = ARC("ARC-Easy", "test", "tests/tasks/fixtures")
    >>> print(conversation_text(task[0]))
    <|bos|><|user_start|>Multiple Choice question: Which planet do we live on?
    - Mars=1
    - Venus=2
    - Earth=3
    - Jupiter=4
    <BLANKLINE>
    Respond only with the letter of the correct answer.<|user_end|>
    <|assistant_start|>3<|assistant_end|>
    >>> task[0]["letters"]
    ('1', '2', '3', '4')
    >>> task.evaluate(task[0], "3"), task.reward(task[0], "4")
    (True, 0.0)

Evaluation does not let the model write: the answer is the letter whose logit after
<|assistant_start|> is the largest of the problem's letters.
"""

from pathlib import Path

from nanochat.settings import require_known
from nanochat.text.chat_format import Conversation
from tasks.common import multiple_choice
from tasks.registry import TaskEntry
from tasks.rows import Row
from tasks.sources import DatasetTask, Source

SOURCES = {
    subset: Source(
        repository="allenai/ai2_arc",
        revision="210d026faf9955653af8916fad021475a3f00453",
        places=(f"arc/{subset}", subset.lower().replace("-", "_")),
        splits=("train", "validation", "test"),
        columns=("question", "choices", "answerKey"),
    )
    for subset in ("ARC-Easy", "ARC-Challenge")
}


class ARC(DatasetTask):
    """Questions with three to five choices, lettered as in the data set.

    subset  ARC-Easy or ARC-Challenge
    split   train, validation or test
    Raises  ValueError for an unknown subset or split, or missing files.
    """

    eval_type = "categorical"

    def __init__(
        self, subset: str, split: str, task_data: Path | str = "", **view: int | None
    ) -> None:
        require_known("subset", subset, SOURCES)
        self.source = SOURCES[subset]
        super().__init__(split, task_data, **view)

    def conversation(self, row: Row) -> Conversation:
        # most questions are lettered A to D, some 1 to 4: the model must use the row's own letters
        letters, choices = row["choices"]["label"], row["choices"]["text"]
        return multiple_choice(row["question"], letters, choices, row["answerKey"])

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]


TASKS = tuple(
    TaskEntry(
        subset,
        ARC,
        arguments=(subset,),
        guessing=0.25,
        in_chatcore=True,
        in_sft_tests=subset == "ARC-Easy",
        source=source,
    )
    for subset, source in SOURCES.items()
)
