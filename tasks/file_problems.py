"""A row of a file as a problem: which of its columns is the question, which the answer.

>>> row = {"Body": "Ann has 3 pears and eats 1.", "Ask": "How many are left?", "answer": 2}
>>> from tasks.file_description import Description
>>> problem_of("pears.jsonl:1", row, Description(question="{Body} {Ask}")).question
'Ann has 3 pears and eats 1. How many are left?'
"""

import ast
import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from nanochat.settings import near_miss
from nanochat.text.chat_format import Conversation
from tasks.common import dialogue, multiple_choice
from tasks.file_description import Description
from tasks.rows import Row

# the names of columns that need no description
USUAL = {
    "question": ("question", "problem", "input", "prompt"),
    "answer": ("answer", "target", "output", "answerKey"),
    "choices": ("choices", "options"),
    "tests": ("tests", "test", "test_list"),
    "entry_point": ("entry_point",),
}
COLUMN_IN_TEXT = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Problem:
    """A row, read and checked.

    place  file and line, for messages
    kind   choice, program or answer
    """

    place: str
    kind: str
    question: str
    answer: str
    letters: Sequence[str] = ()
    choices: Sequence[str] = ()
    test: str = ""
    entry_point: str = ""

    def conversation(self) -> Conversation:
        """The question and its right answer, with what its task needs to judge others."""
        if self.kind == "choice":
            return multiple_choice(self.question, self.letters, self.choices, self.answer)
        program = {"test": self.test, "entry_point": self.entry_point}
        return dialogue(self.question, self.answer, **(program if self.test else {}))


def problem_of(place: str, row: Row, description: Description) -> Problem:
    """The problem that a row is. Raises ValueError naming its place, column and what to write."""
    columns = {key: column_of(place, row, key, getattr(description, key)) for key in USUAL}
    question = text_of(place, row, "question", columns["question"])
    if columns["tests"]:
        given = columns["answer"]
        answer = text_of(place, row, "answer", given) if given else ""
        test = row[columns["tests"]]
        lines = test if isinstance(test, list) else [test]
        test = "\n".join(text(place, columns["tests"], line) for line in lines)
        try:
            ast.parse(test)
        except SyntaxError as error:
            raise ValueError(
                f"{place}: {columns['tests']} is no Python ({error.msg}); "
                "write asserts that call the entry point"
            ) from error
        function = text_of(place, row, "entry_point", columns["entry_point"])
        if not function.isidentifier():
            raise ValueError(f"{place}: entry_point {function!r:.60} is no name of a function")
        return Problem(place, "program", question, answer, test=test, entry_point=function)
    lettered = choices_of(place, row, description.choices or columns["choices"])
    if lettered:
        value = row.get(columns["answer"]) if columns["answer"] else None
        if not isinstance(value, int) or isinstance(value, bool):
            value = text_of(place, row, "answer", columns["answer"])
        letters, choices = tuple(lettered), tuple(lettered.values())
        return Problem(
            place, "choice", question, letter_of(place, value, lettered), letters, choices
        )
    return Problem(place, "answer", question, text_of(place, row, "answer", columns["answer"]))


def column_of(place: str, row: Row, key: str, named: Any) -> str:
    """The column or text that a description names, otherwise the usual one; "" for neither."""
    if isinstance(named, list):
        return ""
    if named:
        for column in [named] if named in row else COLUMN_IN_TEXT.findall(named) or [named]:
            if column not in row:
                raise ValueError(f"{place}: no column {column!r} for {key}{near_miss(column, row)}")
        return named
    found = [name for name in USUAL[key] if name in row]
    if len(found) > 1:
        raise ValueError(
            f"{place}: {' and '.join(found)} may both be the {key}; rename one, or name it in a "
            "description (docs/adding_a_task.md)"
        )
    return found[0] if found else ""


def text_of(place: str, row: Row, key: str, column: str) -> str:
    """The text of a column, or of several columns within a text."""
    if not column:
        raise ValueError(
            f"{place}: no {key} among the columns {', '.join(map(str, row))}; call it "
            f"{' or '.join(USUAL[key])}, or name it in a description (docs/adding_a_task.md)"
        )
    if column in row:
        return text(place, column, row[column])
    return COLUMN_IN_TEXT.sub(lambda match: text(place, match[1], row[match[1]]), column)


def text(place: str, column: str, value: Any) -> str:
    """A text or a number as a text."""
    finite = isinstance(value, int | float | Decimal) and math.isfinite(value)
    if isinstance(value, bool) or not (finite or isinstance(value, str)) or not str(value).strip():
        raise ValueError(f"{place}: column {column} is {value!r:.60}; write a text or a number")
    return str(value).strip()


def choices_of(place: str, row: Row, named: str | list[str]) -> dict[str, str]:
    """Letter -> choice; an empty dict for a row without choices."""
    if isinstance(named, str) and named:
        value = row.get(named)
        if isinstance(value, dict) and {"text", "label"} <= set(value):  # as ARC has them
            letters, values = value["label"], value["text"]
        else:
            letters, values = string.ascii_uppercase, value
        if not isinstance(values, list) or not 2 <= len(values) <= len(letters):
            raise ValueError(
                f"{place}: column {named} is {value!r:.60}; write a list of 2 to 26 texts, or "
                "columns A, B, C ..."
            )
        return {letters[i]: text(place, named, choice) for i, choice in enumerate(values)}
    columns = named or [letter for letter in string.ascii_uppercase if letter in row]
    if not isinstance(columns, list) or (len(columns) < 2 and not named):
        return {}
    # a question may have fewer choices than another: its last cells are empty
    while columns and row.get(columns[-1], "") in ("", None):
        columns = columns[:-1]
    missing = [column for column in columns if column not in row]
    if missing or len(columns) < 2:
        raise ValueError(f"{place}: choices need two columns or more of {', '.join(map(str, row))}")
    pairs = zip(string.ascii_uppercase, columns, strict=False)
    return {letter: text(place, column, row[column]) for letter, column in pairs}


def letter_of(place: str, answer: str | int, lettered: dict[str, str]) -> str:
    """The letter of the right choice."""
    letters = list(lettered)
    if isinstance(answer, int) and str(answer) not in letters and 0 <= answer < len(letters):
        return letters[answer]
    meant = {letter for letter, choice in lettered.items() if str(answer) in (letter, choice)}
    if len(meant) != 1:
        raise ValueError(
            f"{place}: answer {answer!r:.60} is {'two' if meant else 'none'} of the choices; write "
            f"its letter, {' or '.join(letters)}"
        )
    return meant.pop()
