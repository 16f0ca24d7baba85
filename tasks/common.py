"""What a task is: conversations by index, and a check whether an answer to one of them is right.

A conversation is a dict as in nanochat/text/chat_format.py, {"messages": [...]}; its last message
is the right answer. Anything else that a task needs to check an answer is stored next to the
messages: a multiple-choice conversation has "letters", the allowed answers.
"""

import copy
import re
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import accumulate
from typing import Any, Literal, overload

import numpy as np

from nanochat.text.chat_format import Conversation

SHUFFLE_SEED = 42
# The number after the marker. 1,319 and 1 319 are the same number, as are 18 and 18.00.
FINAL_NUMBER = re.compile(r"####\s*(-?)\s*\$?\s*([0-9]+(?:[, ][0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")


class Task(Sequence[Conversation]):
    """Conversations of one kind, or a view of some of them.

    num_examples       how many `get_example` can make
    start, stop, step  the part to show, as in a slice; `task[start:stop:step]` is the same
    """

    # "categorical": the answer is one of conversation["letters"]; "generative": the model writes;
    # "none": there are no right answers, the conversations are for training only
    eval_type: Literal["categorical", "generative", "none"] = "generative"
    # True keeps the task out of every mixture
    evaluation_only = False
    # True: answers are programs, and its class takes allow_weaker_sandbox
    runs_code = False
    # of everything a verdict depends on, where that is a file of the user's, who may change it
    digest = ""

    def __init__(
        self,
        num_examples: int,
        start: int | None = None,
        stop: int | None = None,
        step: int | None = None,
    ) -> None:
        self.indices = range(num_examples)[start:stop:step]

    @abstractmethod
    def get_example(self, index: int) -> Conversation:
        """Conversation number `index`, 0 <= index < num_examples; the same one on every call."""

    def ready(self) -> None:
        """Called before the first answer. Raises ValueError where none can be judged here."""

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Whether the answer to the conversation's last question is right."""
        raise NotImplementedError(f"{type(self).__name__} has no right answers to compare with")

    def reward(self, conversation: Conversation, answer: str) -> float:
        """The reward of reinforcement learning: 1 if the answer is right, otherwise 0."""
        return float(self.evaluate(conversation, answer))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Conversation]:
        # Sequence's own __iter__ would take an IndexError raised inside get_example for the end
        return (self.get_example(index) for index in self.indices)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> "Task": ...

    def __getitem__(self, index: int | slice) -> "Conversation | Task":
        if isinstance(index, slice):
            view = copy.copy(self)
            view.indices = self.indices[index]
            return view
        return self.get_example(self.indices[index])


class TaskSequence(Task):
    """Several tasks one after the other: a curriculum.

    Raises  ValueError for no task, or for one that is for evaluation only.
    """

    def __init__(self, tasks: Sequence[Task], **view: int | None) -> None:
        if not tasks:
            raise ValueError("a mixture needs at least one task")
        for task in tasks:
            if task.evaluation_only:
                raise ValueError(
                    f"{type(task).__name__} is for evaluation only: a model trained on it can no "
                    "longer be measured with it; leave it out of the mixture"
                )
        self.tasks = tuple(tasks)
        self.ends = list(accumulate(len(task) for task in tasks))
        super().__init__(self.ends[-1], **view)

    def get_example(self, index: int) -> Conversation:
        # parts of 5, 0 and 2 conversations have ends 5, 5, 7: index 5 is number 0 of the third
        which = bisect_right(self.ends, index)
        begin = self.ends[which - 1] if which else 0
        return self.tasks[which][index - begin]


class TaskMixture(TaskSequence):
    """Several tasks shuffled together, the same way for the same seed.

    A task that is listed twice is seen twice per epoch.
    """

    def __init__(self, tasks: Sequence[Task], seed: int = SHUFFLE_SEED, **view: int | None) -> None:
        super().__init__(tasks, **view)
        self.order = shuffled(self.ends[-1], seed)

    def get_example(self, index: int) -> Conversation:
        return super().get_example(int(self.order[index]))


def shuffled(count: int, seed: int = SHUFFLE_SEED) -> np.ndarray:
    """The indices 0 ... count - 1 in random order, int64.

    The same order as `datasets.Dataset.shuffle(seed)`, so the first n problems of a task are the
    ones that others evaluate on when they take the first n after that shuffle.
    """
    return np.random.default_rng(seed).permutation(count)


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The question of a multiple-choice problem.

    The letter follows its choice, which small models associate better than the reverse, and there
    is no space before it, so that the answer is the same token as the letter in the question.

    >>> print(render_mc("What is liquid?", ["A", "B"], ["iron", "water"]))
    Multiple Choice question: What is liquid?
    - iron=A
    - water=B
    <BLANKLINE>
    Respond only with the letter of the correct answer.
    """
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}\n"
        "Respond only with the letter of the correct answer."
    )


def dialogue(question: str, answer: str | list[dict[str, str]], **more: Any) -> Conversation:
    """A conversation of one question and its answer, a text or parts; `more` beside them."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def multiple_choice(
    question: str, letters: Sequence[str], choices: Sequence[str], answer: str
) -> Conversation:
    """A conversation that asks for one of the letters.

    Raises  ValueError if the answer is not one of them, or there is not a letter for each choice.
    """
    if answer not in letters or len(letters) != len(choices):
        raise ValueError(f"answer {answer!r}, letters {letters} and choices {choices} do not fit")
    return dialogue(render_mc(question, letters, choices), answer, letters=tuple(letters))


def last_text(conversation: Conversation) -> str:
    """The text of the last message; of a message in parts, its text parts joined."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def final_number(text: str) -> Decimal | None:
    """The number after the first ####, or None.

    >>> final_number("so it is\\n#### 1,319 people"), final_number("1,319")
    (Decimal('1319'), None)
    """
    match = FINAL_NUMBER.search(text)
    if match is None:
        return None
    sign, digits = match.groups()
    return Decimal(sign + re.sub("[, ]", "", digits))
