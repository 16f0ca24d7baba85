"""Answers that are programs: the code of an answer, and its verdict from the sandbox.

>>> extract_code("Sure:\\n```python\\nprint(1)\\n```\\nThat is all.")
'print(1)'
"""

import re
from collections.abc import Callable

from nanochat.sandbox.execution import judge, shared_sandbox
from nanochat.text.chat_format import Conversation
from tasks.common import Task

# an answer that was cut off leaves its block open
CODE_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", re.DOTALL)

# whether a function that a program defines passes a test: (program, test, name of the function)
Judge = Callable[[str, str, str], bool]


class ProgramTask(Task):
    """Problems whose answer is right if a test passes when it is run on the answer's code.

    Beside its messages a conversation has "test", a program, and "entry_point", the function that
    the test calls.

    judge                 tells whether an answer passes; None asks the sandbox
    allow_weaker_sandbox  judge answers even where this kernel cannot hold every barrier
    """

    runs_code = True
    judge: Judge | None = None
    allow_weaker_sandbox = False

    def ready(self) -> None:
        if self.judge is None:
            shared_sandbox(self.allow_weaker_sandbox).ready()

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Whether the answer passes. Raises ValueError where a barrier is missing."""
        function, weaker = conversation["entry_point"], self.allow_weaker_sandbox
        candidate, test = programs(conversation, answer)
        if self.judge is not None:
            return self.judge(candidate, test, function)
        return judge(candidate, test, function, allow_weaker_sandbox=weaker).success


def programs(conversation: Conversation, answer: str) -> tuple[str, str]:
    """The answer's program, which defines the function, and the test's, which calls it.

    A test that defines `check`, as HumanEval's do, is called with the function.
    """
    question, function = conversation["messages"][-2]["content"], conversation["entry_point"]
    # answers often leave out the imports and helpers that the prompt has before the function, and
    # tests use them too; a question in words has no code before it
    before, definition, _ = question.partition(f"def {function}(")
    preamble = before if definition else ""
    test = conversation["test"]
    call = f"check({function})" if re.search(r"^def check\(", test, re.MULTILINE) else ""
    candidate = "\n\n".join([preamble, extract_code(answer)])
    return candidate, "\n\n".join([preamble, test, call])


def extract_code(answer: str) -> str:
    """The first fenced block of an answer; the whole answer if there is none."""
    match = CODE_BLOCK.search(answer)
    return match[1] if match else answer
