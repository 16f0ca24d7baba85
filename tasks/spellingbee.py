"""Made-up problems about letters: how many of one there are in a word, and how a word is spelled.

Tokens hide the letters, so the answer spells the word first, counts, and checks with the tool.
Every problem is made from its index, the same at every call. A word belongs to training or to
testing for good (by its CRC-32), in both tasks alike.
"""

import random
import re
import string
import zlib
from pathlib import Path

from nanochat.text.chat_format import Conversation
from tasks.common import Task, final_number, last_text
from tasks.sources import data_folder

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "test")
EVALUATION_SIZE = 256
TEST_SHARE = 8  # one word in so many is for testing
PRESENT_SHARE = 0.9  # of the questions are about a letter that the word has


class SpellingBee(Task):
    """How many of a letter are in a word; the answer is right if the number behind #### is.

    split      train or test: other words
    size       problems
    task_data  folder that may have words/words_alpha.txt, a word a line; else the words that come
               with the code
    Raises     ValueError for an unknown split or a word file without words.
    """

    def __init__(
        self,
        split: str,
        task_data: Path | str = "",
        size: int = EVALUATION_SIZE,
        **view: int | None,
    ) -> None:
        self.split = split
        self.words = load_words(split, task_data)
        questions = (DATA / "spelling_questions.txt").read_text(encoding="utf-8")
        self.questions = questions.splitlines()
        super().__init__(size, **view)

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"SpellingBee {self.split} {index}")
        word = rng.choice(self.words)
        present = rng.random() < PRESENT_SHARE
        letter = rng.choice(word if present else string.ascii_lowercase)
        quote = rng.choice(["", "'", '"'])
        question = rng.choice(self.questions).format(
            letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}"
        )
        if rng.random() < 0.5:
            question = question.lower().rstrip("? ")
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": counting_parts(word, letter)},
            ],
            "word": word,
        }

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return final_number(answer) == final_number(last_text(conversation))


class SimpleSpelling(Task):
    """Spell a word, its letters parted by commas. Arguments and errors are those of SpellingBee."""

    def __init__(
        self,
        split: str,
        task_data: Path | str = "",
        size: int = EVALUATION_SIZE,
        **view: int | None,
    ) -> None:
        self.split = split
        self.words = load_words(split, task_data)
        super().__init__(size, **view)

    def get_example(self, index: int) -> Conversation:
        word = random.Random(f"SimpleSpelling {self.split} {index}").choice(self.words)
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": spell(word)},
            ],
            "word": word,
        }

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer.strip() == last_text(conversation)


def spell(word: str) -> str:
    """cat -> cat:c,a,t: a letter right behind a comma or colon is the token it is alone."""
    return f"{word}:{','.join(word)}"


def counting_parts(word: str, letter: str) -> list[dict[str, str]]:
    """The answer in parts: spelled and counted by hand, then by the tool."""
    count, lines = 0, []
    for position, found in enumerate(word, 1):
        count += found == letter
        lines.append(f"{position}:{found}" + (f" yes, {count} so far" if found == letter else ""))
    by_hand = (
        f"Let me spell the word and count every '{letter}'.\n\n{spell(word)}\n\n"
        + "\n".join(lines)
        + f"\n\nBy hand I count {count}. Let me check with Python.\n\n"
    )
    return [
        {"type": "text", "text": by_hand},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython counts {count}.\n\n#### {count}"},
    ]


def load_words(split: str, task_data: Path | str = "") -> list[str]:
    """The words of a split: of <task_data>/words/words_alpha.txt, otherwise of the code's list.

    Raises  ValueError for an unknown split or a file without lower-case words for it.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose {' or '.join(SPLITS)}")
    path = data_folder(task_data) / "words" / "words_alpha.txt"
    if not path.is_file():
        path = DATA / "words.txt"
    words = re.findall(r"^[a-z]{3,}$", path.read_text(encoding="utf-8"), flags=re.M)
    wanted = split == "test"
    chosen = [word for word in words if (zlib.crc32(word.encode()) % TEST_SHARE == 0) == wanted]
    if not chosen:
        raise ValueError(f"{path} has no words for {split}: write lower-case words, one a line")
    return chosen
