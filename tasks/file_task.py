"""A task without code: questions in a file, or in a data set of the Hub, and how they are judged.

    my_task.jsonl    rows with columns of the usual names, or
    my_task.json     a description, an object whose "rows" say where the rows are

docs/adding_a_task.md has the names and the keys. What a row has decides what is asked:

    question, choices, answer        the most likely letter, as in tasks/arc.py
    question, tests, entry_point     a program, as in tasks/humaneval.py
    question, answer                 a number or a text, found in what the model writes
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat.text.chat_format import Conversation
from tasks.common import Task, last_text
from tasks.file_answers import Reader
from tasks.file_description import Description, described
from tasks.file_problems import Problem, problem_of
from tasks.file_rows import placed_rows, read_json, short_name
from tasks.programs import ProgramTask

# Reinforcement learning trains on a file and tests on it: one problem in this many is for testing.
TEST_SHARE = 10


@dataclass(frozen=True)
class FileTask:
    """What a file or a data set holds, read and checked.

    name      for records and reports
    problems  those that are asked
    shots     messages before each question
    """

    name: str
    description: Description
    problems: Sequence[Problem]
    shots: Sequence[dict[str, Any]]

    @property
    def digest(self) -> str:
        """Of everything that a result depends on, but where it was read from."""
        how = asdict(self.description) | {"rows": "", "shots_from": ""}
        asked = [asdict(problem) | {"place": ""} for problem in self.problems]
        text = json.dumps([how, self.shots, asked], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def kind(self) -> "type[FileProblems]":
        """The class of its task."""
        kinds = {"choice": FileChoices, "program": FilePrograms, "answer": FileAnswers}
        return kinds[self.problems[0].kind]


def read_task(name: str) -> FileTask:
    """The task in a file of rows, a description or a data set of the Hub.

    Raises  ValueError naming the file, the line, the column and what to write instead.
    """
    description, folder = Description(rows=name), Path()
    if Path(name).suffix == ".json" and not name.startswith("hub:"):
        path = Path(name).expanduser()
        value = read_json(path) if path.is_file() else None
        if isinstance(value, dict) and isinstance(value.get("rows"), str):
            description, folder = described(value, name), path.parent
    problems = _problems(description.rows, description, folder)
    shots = problems[: description.shots]
    if description.shots_from:
        shots = _problems(description.shots_from, description, folder)[: description.shots]
    else:
        problems = problems[description.shots :]
    if len(shots) < description.shots or not problems:
        raise ValueError(
            f"{name}: shots {description.shots} leave no problem to ask, or are more than there "
            "are; lower them, or name a file of other problems with shots_from"
        )
    for problem in problems + shots:
        if problem.kind != problems[0].kind:
            raise ValueError(
                f"{problem.place}: the kind of its answer is {problem.kind}, of the one in "
                f"{problems[0].place} it is {problems[0].kind}; write files of one kind each"
            )
    for problem in shots:
        if not problem.answer:
            raise ValueError(f"{problem.place}: no answer to show; write one, or leave out shots")
    messages = [m for problem in shots for m in problem.conversation()["messages"]]
    if problems[0].kind != "answer":
        for key in ("pattern", "compare", "ignore_case"):
            if getattr(description, key):
                raise ValueError(
                    f"{name}: {key} has no meaning where the answer is a {problems[0].kind}; "
                    "leave it out"
                )
    return FileTask(short_name(name), description, problems, messages)


def _problems(rows: str, description: Description, folder: Path) -> list[Problem]:
    where = rows if rows.startswith("hub:") else str(folder / Path(rows).expanduser())
    return [problem_of(place, row, description) for place, row in placed_rows(where)]


class FileProblems(Task):
    """The problems of a file.

    split   all, or for reinforcement learning train and test, which share none: every tenth is for
            testing
    Raises  ValueError for a file of one problem, which cannot be shared out.
    """

    def __init__(
        self, file: FileTask, split: str, task_data: Path | str = "", **view: int | None
    ) -> None:
        chosen = file.problems
        if split != "all":
            in_test = [index % TEST_SHARE == 0 for index in range(len(chosen))]
            chosen = [
                p for p, test in zip(chosen, in_test, strict=True) if test == (split == "test")
            ]
        if not chosen:
            raise ValueError(f"{file.name} has one problem; training and testing need two")
        self.file, self.problems, self.digest = file, chosen, file.digest
        super().__init__(len(chosen), **view)

    def get_example(self, index: int) -> Conversation:
        conversation = self.problems[index].conversation()
        return conversation | {"messages": [*self.file.shots, *conversation["messages"]]}


class FileChoices(FileProblems):
    """Questions with choices; the answer is a letter."""

    eval_type = "categorical"

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]


class FilePrograms(ProgramTask, FileProblems):
    """Questions whose answers are programs."""

    def __init__(
        self,
        file: FileTask,
        split: str,
        task_data: Path | str = "",
        allow_weaker_sandbox: bool = False,
        **view: int | None,
    ) -> None:
        self.allow_weaker_sandbox = allow_weaker_sandbox
        super().__init__(file, split, task_data, **view)


class FileAnswers(FileProblems):
    """Questions whose answers are numbers or texts.

    Raises  ValueError, besides, for a right answer that is no number where numbers are compared.
    """

    def __init__(self, file: FileTask, *arguments: Any, **view: Any) -> None:
        super().__init__(file, *arguments, **view)
        how = file.description
        # the whole file decides, not a row: the same answer is then always read the same way
        self.reader = Reader(file.name, how.pattern, how.compare != "text", how.ignore_case)
        for problem in file.problems if how.compare != "text" else ():
            if self.reader.whole_number(problem.answer) is None:
                if how.compare:
                    raise ValueError(
                        f"{problem.place}: answer {problem.answer!r:.60} is no number, and "
                        'numbers are compared; correct it, or write "compare": "text"'
                    )
                self.reader = Reader(file.name, how.pattern, False, how.ignore_case)
                break

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return self.reader.agree(last_text(conversation), answer)
