"""Whether what a model wrote gives the right answer: find the answer in it, compare.

>>> Reader("sums").agree("1319", "Adding both makes 1,319.00 people.")
True
>>> reader = Reader("riddles", pattern="answer is (\\w+)", numbers=False, ignore_case=True)
>>> reader.agree("Echo", "The answer is echo."), reader.agree("Echo", "echo")
(True, False)
"""

import re
from dataclasses import dataclass
from decimal import Decimal

import regex

from tasks.common import final_number

# of one answer; a pattern that needs longer tries an exponential number of ways to match it
PATTERN_SECONDS = 1.0
# -5, 1,319 and 18.50, but no -3 in 10-3
NUMBER = re.compile(
    r"(?<![\w.])-?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?"
    r"|(?<![\w.])-?\.[0-9]+"
    r"|[0-9]+(?:\.[0-9]+)?"
)


@dataclass(frozen=True)
class Reader:
    """Reads answers.

    name         of the task, for messages
    pattern      regular expression with one group, the answer; "" takes the whole text
    numbers      compare the last numbers in what was found, otherwise its text
    ignore_case  of the text, and in the pattern
    """

    name: str
    pattern: str = ""
    numbers: bool = True
    ignore_case: bool = False

    def agree(self, right: str, answer: str) -> bool:
        """Whether an answer is the right one. The pattern need not match the right one.

        Raises  ValueError for a pattern that takes too long.
        """
        if self.numbers:
            return self.whole_number(right) == self.last_number(self.found(answer) or "")
        said, wanted = self.found(answer), self.found(right)
        if said is None:
            return False
        said, wanted = said.strip(), (wanted or right).strip()
        return said.casefold() == wanted.casefold() if self.ignore_case else said == wanted

    def found(self, text: str) -> str | None:
        """The group of the pattern's last match that is not empty, None where there is none."""
        if not self.pattern:
            return text
        try:
            compiled = regex.compile(self.pattern, regex.IGNORECASE if self.ignore_case else 0)
            groups = compiled.findall(text, timeout=PATTERN_SECONDS)
        except TimeoutError as error:
            raise ValueError(
                f"{self.name}: pattern {self.pattern!r} takes over {PATTERN_SECONDS} s on "
                f"{text!r:.60}; write it without repetitions inside repetitions"
            ) from error
        return next((group for group in reversed(groups) if group.strip()), None)

    def whole_number(self, text: str) -> Decimal | None:
        """The number that a right answer is, or ends with after ####; None for other texts."""
        text = (self.found(text) or text).replace("\N{MINUS SIGN}", "-").strip()
        match = NUMBER.fullmatch(text)
        return _number(match[0]) if match else final_number(text)

    @staticmethod
    def last_number(text: str) -> Decimal | None:
        """The number after ####, otherwise the last one in a text."""
        numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
        marked = final_number(text)
        return _number(numbers[-1]) if marked is None and numbers else marked


def _number(text: str) -> Decimal:
    return Decimal(re.sub("[$,]", "", text))
