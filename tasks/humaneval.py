'''HumanEval: functions to write from their signature and docstring, checked by unit tests
(arXiv:2107.03374). For evaluation only.

The user's message is the beginning of a program, up to the function's docstring; the right answer
repeats it and adds the body. The last lines of both in a sample problem of the same form:

    >>> from nanochat.text.chat_format import conversation_text
    >>> from tasks.humaneval import HumanEval
    >>> from tasks.programs import programs
    >>> task = HumanEval("test", "tests/tasks/fixtures")
    >>> print("\\n".join(conversation_text(task[0]).splitlines()[8:11]))
        12
        """
    <|user_end|>
    >>> print("\\n".join(conversation_text(task[0]).splitlines()[-3:]))
        """
        return double(double(x))
    <|assistant_end|>

An answer is right if its code, after what the prompt has before the function, passes the test. The
two are programs of their own, run apart (tasks/programs.py).

    >>> answer = "Sure:\\n```python\\ndef quadruple(x):\\n    return 2 * double(x)\\n```"
    >>> candidate, test = programs(task[0], answer)
    >>> print(candidate)
    def double(x: int) -> int:
        """ Twice x. """
        return 2 * x
    <BLANKLINE>
    <BLANKLINE>
    <BLANKLINE>
    <BLANKLINE>
    def quadruple(x):
        return 2 * double(x)
    >>> print(test.partition("return 2 * x")[2].strip())
    def check(candidate):
        assert candidate(3) == 12
        assert candidate(-1) == -4
    <BLANKLINE>
    <BLANKLINE>
    check(quadruple)
'''

from pathlib import Path

from nanochat.text.chat_format import Conversation
from tasks.programs import Judge, ProgramTask
from tasks.registry import TaskEntry
from tasks.rows import Row
from tasks.sources import DatasetTask, Source


class HumanEval(ProgramTask, DatasetTask):
    """Problems whose answer is right if the tests pass when they are run on its code.

    split                 test
    judge                 tells whether an answer passes; in the sandbox where none is given
    allow_weaker_sandbox  judge answers even where this kernel cannot hold every barrier
    Raises                ValueError for an unknown split or missing files.
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
        judge: Judge | None = None,
        allow_weaker_sandbox: bool = False,
        **view: int | None,
    ) -> None:
        self.allow_weaker_sandbox = allow_weaker_sandbox
        self.judge = judge
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


TASKS = (TaskEntry("HumanEval", HumanEval, source=HumanEval.source, in_chatcore=True),)
