'''HumanEval: functions to write from their signature and docstring, checked by unit tests
(arXiv:2107.03374). For evaluation only.

The user's message is the beginning of a program, up to the function's docstring; the right answer
repeats it and adds the body. The last lines of both in a sample problem of the same form:

    >>> from nanochat.text.chat_format import conversation_text
    >>> from tasks.humaneval import HumanEval, checking_program
    >>> task = HumanEval("test", "tests/tasks/fixtures")
    >>> print("\\n".join(conversation_text(task[0]).splitlines()[8:11]))
        12
        """
    <|user_end|>
    >>> print("\\n".join(conversation_text(task[0]).splitlines()[-3:]))
        """
        return double(double(x))
    <|assistant_end|>

An answer is right if this program runs to its end in the sandbox:

    >>> answer = "Sure:\\n```python\\ndef quadruple(x):\\n    return 2 * double(x)\\n```"
    >>> print(checking_program(task[0], answer))
    def double(x: int) -> int:
        """ Twice x. """
        return 2 * x
    <BLANKLINE>
    <BLANKLINE>
    <BLANKLINE>
    <BLANKLINE>
    def quadruple(x):
        return 2 * double(x)
    <BLANKLINE>
    <BLANKLINE>
    <BLANKLINE>
    def check(candidate):
        assert candidate(3) == 12
        assert candidate(-1) == -4
    <BLANKLINE>
    <BLANKLINE>
    check(quadruple)
'''

import re
from collections.abc import Callable
from pathlib import Path

from nanochat.sandbox.execution import execute
from nanochat.text.chat_format import Conversation
from tasks.registry import TaskEntry
from tasks.rows import Row
from tasks.sources import DatasetTask, Source

# an answer that was cut off leaves its block open
CODE_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def runs_in_sandbox(program: str) -> bool:
    """Whether the program ends without an error in the sandbox.

    Raises  RuntimeError where the kernel offers no isolation (nanochat/sandbox/execution.py).
    """
    return execute(program).success


class HumanEval(DatasetTask):
    """Problems whose answer is right if the tests pass when they are run on its code.

    split   test
    run     tells whether a program ends without an error
    Raises  ValueError for an unknown split or missing files.
    """

    evaluation_only = True
    source = Source(
        repository="openai/openai_humaneval",
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        places=("humaneval/openai_humaneval", "humaneval"),
        splits=("test",),
        columns=("prompt", "canonical_solution", "test", "entry_point"),
    )

    def __init__(
        self,
        split: str = "test",
        task_data: Path | str = "",
        run: Callable[[str], bool] = runs_in_sandbox,
        **view: int | None,
    ) -> None:
        self.run = run
        super().__init__(split, task_data, **view)

    def conversation(self, row: Row) -> Conversation:
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
            ],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return self.run(checking_program(conversation, answer))


def checking_program(conversation: Conversation, answer: str) -> str:
    """A program that ends without an error if the answer's code passes the tests."""
    prompt, function = conversation["messages"][0]["content"], conversation["entry_point"]
    # answers often leave out the imports and helpers that the prompt has before the function
    preamble = prompt.partition(f"def {function}(")[0]
    return "\n\n".join([preamble, extract_code(answer), conversation["test"], f"check({function})"])


def extract_code(answer: str) -> str:
    """The first fenced block of an answer; the whole answer if there is none."""
    match = CODE_BLOCK.search(answer)
    return match[1] if match else answer


TASKS = (TaskEntry("HumanEval", HumanEval, source=HumanEval.source, in_chatcore=True),)
