"""GSM8K: word problems from school mathematics, solved with a calculator (arXiv:2110.14168).

Solutions in the data set contain calculations such as <<48/2=24>> and end in "#### 24". Each
calculation becomes a call of the calculator and its output. A sample problem of the same form:

    >>> from nanochat.text.chat_format import conversation_text
    >>> from tasks.gsm8k import GSM8K
    >>> task = GSM8K("test", "tests/tasks/fixtures")
    >>> print(conversation_text(task[0]))
    <|bos|><|user_start|>A town of 1,200 people grows by 300. How many live there now?<|user_end|>
    <|assistant_start|><|python_start|>1200+300<|python_end|>
    <|output_start|>1500<|output_end|>
    1500 people live there now.
    #### 1,500<|assistant_end|>
    >>> task.evaluate(task[0], "It grows to\\n#### 1500 people."), task.evaluate(task[0], "1500")
    (True, False)
    >>> task.reward(task[0], "#### 1200")
    0.0
"""

import re

from nanochat.text.chat_format import Conversation
from tasks.common import dialogue, final_number, last_text
from tasks.registry import TaskEntry
from tasks.rows import Row
from tasks.sources import DatasetTask, Source

CALCULATION = re.compile(r"<<([^<>]*)>>")


class GSM8K(DatasetTask):
    """Problems whose answer is right if the number after #### is.

    split   train or test
    Raises  ValueError for an unknown split or missing files.
    """

    source = Source(
        repository="openai/gsm8k",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        places=("gsm8k/main", "gsm8k"),
        splits=("train", "test"),
        columns=("question", "answer"),
    )

    def conversation(self, row: Row) -> Conversation:
        return dialogue(row["question"], solution_parts(row["answer"]))

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        right = final_number(last_text(conversation))
        return right is not None and final_number(answer) == right


def solution_parts(solution: str) -> list[dict[str, str]]:
    """A solution as message parts: its text, and for each calculation the tool call and output.

    >>> for part in solution_parts("3*4=<<3*4=12>>12 eggs"): print(part)
    {'type': 'text', 'text': '3*4='}
    {'type': 'python', 'text': '3*4'}
    {'type': 'python_output', 'text': '12'}
    {'type': 'text', 'text': '12 eggs'}
    """
    parts = []
    # splitting by a pattern with a group alternates: text, calculation, text, ...
    for index, piece in enumerate(CALCULATION.split(solution)):
        if index % 2:
            expression, _, result = piece.rpartition("=")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


TASKS = (TaskEntry("GSM8K", GSM8K, source=GSM8K.source, in_chatcore=True, has_reward=True),)
