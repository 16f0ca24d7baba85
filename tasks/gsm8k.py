"""GSM8K: word problems of school mathematics, solved with a calculator (arXiv:2110.14168).

Solutions in the data set hold calculations like <<48/2=24>> and end in "#### 24".
"""

import re
from pathlib import Path

from nanochat.text.chat_format import Conversation
from tasks.common import Task, final_number, last_text, shuffled
from tasks.sources import Source

SOURCE = Source(
    repository="openai/gsm8k",
    revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
    places=("gsm8k/main", "gsm8k"),
    splits=("train", "test"),
    columns=("question", "answer"),
)
CALCULATION = re.compile(r"<<([^<>]*)>>")


class GSM8K(Task):
    """Problems whose answer is right if the number behind #### is.

    split   train or test
    Raises  ValueError for an unknown split or where files are missing.
    """

    def __init__(self, split: str, task_data: Path | str = "", **view: int | None) -> None:
        self.rows = SOURCE.load(split, task_data)
        self.order = shuffled(len(self.rows))
        super().__init__(len(self.rows), **view)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[self.order[index]]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": solution_parts(row["answer"])},
            ]
        }

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        right = final_number(last_text(conversation))
        return right is not None and final_number(answer) == right


def solution_parts(solution: str) -> list[dict[str, str]]:
    """The parts of a solution: its text, and of each calculation the tool call and its output."""
    parts = []
    for index, piece in enumerate(CALCULATION.split(solution)):
        if index % 2:
            expression, _, result = piece.rpartition("=")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
