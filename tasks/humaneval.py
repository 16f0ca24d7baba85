"""HumanEval: functions to write from their signature and docstring, judged by unit tests
(arXiv:2107.03374). For evaluation only.
"""

import re
from collections.abc import Callable
from pathlib import Path

from nanochat.sandbox.execution import execute
from nanochat.text.chat_format import Conversation
from tasks.common import Task, shuffled
from tasks.sources import Source

SOURCE = Source(
    repository="openai/openai_humaneval",
    revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    places=("humaneval/openai_humaneval", "humaneval"),
    splits=("test",),
    columns=("prompt", "canonical_solution", "test", "entry_point"),
)
# An answer that was cut off leaves its block open.
CODE_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def runs_in_sandbox(program: str) -> bool:
    """Whether the program ends without an error in the sandbox.

    Raises  RuntimeError where the kernel offers no isolation (nanochat/sandbox/execution.py).
    """
    return execute(program).success


class HumanEval(Task):
    """Problems whose answer is right if the tests pass when they are run on its code.

    split   test
    run     whether a program ends without an error
    Raises  ValueError for an unknown split or where files are missing.
    """

    evaluation_only = True

    def __init__(
        self,
        split: str = "test",
        task_data: Path | str = "",
        run: Callable[[str], bool] = runs_in_sandbox,
        **view: int | None,
    ) -> None:
        self.run = run
        self.rows = SOURCE.load(split, task_data)
        self.order = shuffled(len(self.rows))
        super().__init__(len(self.rows), **view)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[self.order[index]]
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
    """A program that ends without an error if the answer's code passes the tests.

    What the prompt has before the function (imports, helpers) stands before the answer's code.
    """
    prompt, function = conversation["messages"][0]["content"], conversation["entry_point"]
    preamble = prompt.partition(f"def {function}(")[0]
    return "\n\n".join([preamble, extract_code(answer), conversation["test"], f"check({function})"])


def extract_code(answer: str) -> str:
    """The first fenced block of an answer; the whole answer if there is none."""
    match = CODE_BLOCK.search(answer)
    return match[1] if match else answer
