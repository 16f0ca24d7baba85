"""Generated sums, differences and products of whole numbers, computed with the calculator.

A problem is a function of its split and index. A pair of numbers belongs either to training or to
testing, whatever the operation. A sample problem:

    >>> from nanochat.text.chat_format import conversation_text
    >>> from tasks.arithmetic import Arithmetic
    >>> task = Arithmetic("test")
    >>> print(conversation_text(task[0]))
    <|bos|><|user_start|>361 * 5 =<|user_end|>
    <|assistant_start|><|python_start|>361*5<|python_end|>
    <|output_start|>1805<|output_end|>
    #### 1805<|assistant_end|>
    >>> task.evaluate(task[0], "#### 1805"), task.reward(task[0], "#### -1")
    (True, 0.0)
"""

import random
import zlib
from pathlib import Path

from nanochat.settings import require_known
from nanochat.text.chat_format import Conversation
from tasks.common import Task, dialogue, final_number, last_text
from tasks.registry import TaskEntry

SPLITS = ("train", "test")
TEST_SHARE = 8  # one pair in this many is for testing
LARGEST = 999
NAMES = {"+": "plus", "-": "minus", "*": "times"}
QUESTIONS = (
    "What is {first} {name} {second}?",
    "What is {first} {symbol} {second}?",
    "How much is {first} {name} {second}?",
    "Calculate {first} {symbol} {second}.",
    "{first} {symbol} {second} =",
)


class Arithmetic(Task):
    """One operation on two numbers from 0 to 999; right if the number after #### is.

    split      train or test, which share no pair of numbers
    task_data  not used: problems need no files
    size       number of problems
    Raises     ValueError for an unknown split.
    """

    def __init__(
        self, split: str, task_data: Path | str = "", size: int = 256, **view: int | None
    ) -> None:
        require_known("split", split, SPLITS)
        self.split = split
        super().__init__(size, **view)

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"Arithmetic {self.split} {index}")
        first, second = _pair(rng, self.split)
        symbol = rng.choice(list(NAMES))
        question = rng.choice(QUESTIONS).format(
            first=first, second=second, symbol=symbol, name=NAMES[symbol]
        )
        result = {"+": first + second, "-": first - second, "*": first * second}[symbol]
        parts = [
            {"type": "python", "text": f"{first}{symbol}{second}"},
            {"type": "python_output", "text": str(result)},
            {"type": "text", "text": f"#### {result}"},
        ]
        return dialogue(question, parts)

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return final_number(answer) == final_number(last_text(conversation))


def _pair(rng: random.Random, split: str) -> tuple[int, int]:
    """Two numbers of the split, each with one to three digits with equal probability."""
    # draw until a pair falls into the split: its checksum decides, so no pair is ever in both
    while True:
        first, second = (rng.randint(0, 10 ** rng.randint(1, len(str(LARGEST))) - 1) for _ in "ab")
        if (zlib.crc32(f"{first} {second}".encode()) % TEST_SHARE == 0) == (split == "test"):
            return first, second


TASKS = (TaskEntry("Arithmetic", Arithmetic, SPLITS, has_reward=True),)
