"""What a user says about a task's rows: the keys of a description, an object in a JSON file.

>>> described({"rows": "riddles.csv", "answer": "solution", "shots": 2}, "riddles.json").shots
2
"""

from dataclasses import dataclass, fields
from typing import Any

import regex

from nanochat.settings import near_miss


@dataclass(frozen=True)
class Description:
    """Where a task's problems are and how they are judged.

    rows         file beside the description, or data set: hub:owner/name:folder:split
    question     column, or a text with columns in braces: "{Body} {Question}"; so are the next two
    answer       a number or a text; of choices the letter, the text or, as a number, the index
    entry_point  name of the function that the tests call
    tests        column of a program that asserts, or a list of its lines
    choices      column of a list, or a list of columns; "" is A, B, C ... where there are such
    shots        problems that come before each question, with their answers; they are not asked
    shots_from   where these are; "" takes the first of the rows
    pattern      regular expression whose one group is the answer; the last match counts
    compare      number, text, or "" for number where every right answer is one
    ignore_case  of a text, and in the pattern
    """

    rows: str = ""
    question: str = ""
    answer: str = ""
    choices: str | list[str] = ""
    tests: str = ""
    entry_point: str = ""
    shots: int = 0
    shots_from: str = ""
    pattern: str = ""
    compare: str = ""
    ignore_case: bool = False


def described(value: dict[str, Any], name: str) -> Description:
    """The description that a JSON object is. Raises ValueError naming the key that is wrong."""
    keys = [field.name for field in fields(Description)]
    for key, given in value.items():
        if key not in keys:
            raise ValueError(f"{name}: unknown key {key!r}{near_miss(key, keys)}")
        wanted = type(getattr(Description, key))
        listed = key == "choices" and isinstance(given, list)
        if type(given) is not wanted and not listed:
            raise ValueError(f"{name}: {key} is {given!r:.60}; write a {wanted.__name__}")
    description = Description(**value)
    if description.shots < 0 or (description.shots_from and not description.shots):
        raise ValueError(f"{name}: shots is {description.shots}; write at least 1, or neither")
    if description.compare not in ("", "number", "text"):
        raise ValueError(f"{name}: compare is {description.compare!r}; write number or text")
    try:
        groups = regex.compile(description.pattern).groups
    except regex.error as error:
        raise ValueError(f"{name}: pattern {description.pattern!r}: {error}") from error
    if description.pattern and groups != 1:
        raise ValueError(
            f"{name}: pattern {description.pattern!r} has {groups} groups; write (...) around the "
            "answer and (?:...) around anything else"
        )
    return description
