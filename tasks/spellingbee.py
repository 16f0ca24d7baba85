"""Generated problems about letters: how many there are of one in a word, how a word is spelled.

A model sees tokens, not letters, so the answer spells the word first, then counts, then checks
with the tool. A problem is a function of its split and index. A word belongs either to training or
to testing (by its CRC-32), and to the same in both tasks. Sample problems:

    >>> from nanochat.text.chat_format import conversation_text
    >>> from tasks.spellingbee import SimpleSpelling, SpellingBee
    >>> task = SpellingBee("test")
    >>> print(conversation_text(task[0]))
    <|bos|><|user_start|>Please count the letter n in the word keen<|user_end|>
    <|assistant_start|>Let me spell the word and count every 'n'.
    <BLANKLINE>
    keen:k,e,e,n
    <BLANKLINE>
    1:k
    2:e
    3:e
    4:n yes, 1 so far
    <BLANKLINE>
    By hand I count 1. Let me check with Python.
    <BLANKLINE>
    <|python_start|>'keen'.count('n')<|python_end|>
    <|output_start|>1<|output_end|>
    <BLANKLINE>
    <BLANKLINE>
    Python counts 1.
    <BLANKLINE>
    #### 1<|assistant_end|>
    >>> task.evaluate(task[0], "#### 1"), task.reward(task[0], "2")
    (True, 0.0)
    >>> task = SimpleSpelling("test")
    >>> print(conversation_text(task[0]))
    <|bos|><|user_start|>Spell the word: here<|user_end|>
    <|assistant_start|>here:h,e,r,e<|assistant_end|>
    >>> task.evaluate(task[0], " here:h,e,r,e"), task.reward(task[0], "here:h,e,r")
    (True, 0.0)
"""

import functools
import random
import re
import string
import zlib
from pathlib import Path

from nanochat.settings import require_known
from nanochat.text.chat_format import Conversation
from tasks.common import Task, dialogue, final_number, last_text
from tasks.registry import TaskEntry
from tasks.sources import data_folder

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "test")
EVALUATION_SIZE = 256
TEST_SHARE = 8  # one word in this many is for testing
PRESENT_SHARE = 0.9  # of the questions ask about a letter that is in the word


class SpellingTask(Task):
    """Problems about the words of a split.

    split      train or test, which share no word
    task_data  folder that may have words/words_alpha.txt, one word per line; otherwise the words
               that come with the code
    size       number of problems
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
        super().__init__(size, **view)


class SpellingBee(SpellingTask):
    """How often a letter occurs in a word; the answer is right if the number after #### is."""

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"SpellingBee {self.split} {index}")
        word = rng.choice(self.words)
        # mostly letters that occur, sometimes any letter: zero must be a possible answer
        present = rng.random() < PRESENT_SHARE
        letter = rng.choice(word if present else string.ascii_lowercase)
        # people quote or do not, and do not always write capitals and question marks
        quote = rng.choice(["", "'", '"'])
        question = rng.choice(question_templates()).format(
            letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}"
        )
        if rng.random() < 0.5:
            question = question.lower().rstrip("? ")
        return dialogue(question, counting_parts(word, letter), word=word)

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return final_number(answer) == final_number(last_text(conversation))


class SimpleSpelling(SpellingTask):
    """Spell a word, its letters separated by commas."""

    def get_example(self, index: int) -> Conversation:
        word = random.Random(f"SimpleSpelling {self.split} {index}").choice(self.words)
        return dialogue(f"Spell the word: {word}", spell(word), word=word)

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer.strip() == last_text(conversation)


@functools.cache
def question_templates() -> list[str]:
    """Ways to ask how many of {letter} are in {word}."""
    return (DATA / "spelling_questions.txt").read_text(encoding="utf-8").splitlines()


def spell(word: str) -> str:
    """cat -> cat:c,a,t. After a comma or colon a letter is the same token as on its own."""
    return f"{word}:{','.join(word)}"


def counting_parts(word: str, letter: str) -> list[dict[str, str]]:
    """The answer as message parts: spelled and counted by hand, then counted by the tool."""
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
    """The words of a split, from <task_data>/words/words_alpha.txt or the list in tasks/data/.

    Raises  ValueError for an unknown split or a file without lower-case words for it.
    """
    require_known("split", split, SPLITS)
    path = data_folder(task_data) / "words" / "words_alpha.txt"
    if not path.is_file():
        path = DATA / "words.txt"
    words = re.findall(r"^[a-z]{3,}$", path.read_text(encoding="utf-8"), flags=re.M)
    in_test = {word for word in words if zlib.crc32(word.encode()) % TEST_SHARE == 0}
    chosen = [word for word in words if (word in in_test) == (split == "test")]
    if not chosen:
        raise ValueError(f"{path} has no words for {split}: write lower-case words, one per line")
    return chosen


TASKS = (
    TaskEntry("SpellingBee", SpellingBee, SPLITS, in_chatcore=True, has_reward=True),
    TaskEntry("SimpleSpelling", SimpleSpelling, SPLITS, has_reward=True),
)
