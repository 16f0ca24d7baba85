"""Made-up sums, differences and products of whole numbers, worked out by the calculator.

Every problem is made from its index, the same at every call. A pair of numbers belongs to training
or to testing for good, whatever is done with it.
"""

import random
import zlib

from nanochat.text.chat_format import Conversation
from tasks.common import Task, final_number, last_text

SPLITS = ("train", "test")
TEST_SHARE = 8  # one pair in so many is for testing
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
    """One operation on two numbers from 0 to 999; right if the number behind #### is.

    split   train or test: other pairs
    size    problems
    Raises  ValueError for an unknown split.
    """

    def __init__(self, split: str, size: int = 256, **view: int | None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; choose {' or '.join(SPLITS)}")
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
        return {
            "messages": [
                {"role": "user", "content": question},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "python", "text": f"{first}{symbol}{second}"},
                        {"type": "python_output", "text": str(result)},
                        {"type": "text", "text": f"#### {result}"},
                    ],
                },
            ]
        }

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return final_number(answer) == final_number(last_text(conversation))


def _pair(rng: random.Random, split: str) -> tuple[int, int]:
    """Two numbers of the split, of one to three digits each with equal chances."""
    while True:
        first, second = (rng.randint(0, 10 ** rng.randint(1, len(str(LARGEST))) - 1) for _ in "ab")
        if (zlib.crc32(f"{first} {second}".encode()) % TEST_SHARE == 0) == (split == "test"):
            return first, second
