"""What a setting may be: ranges and choices, written once, in the annotation of the field itself.

    depth: Count = 20  # transformer blocks
    warmup_ratio: Share = 0.0  # share of the run in which the rates rise
    packing: Annotated[str, Choices(("stream", "bestfit"))] = "stream"  # how rows are filled

`configurator.load` checks every value, whether a flag or a config file gives it, before anything
starts; --help and docs/scripts_reference.md show what is allowed.
"""

import difflib
import math
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """The numbers a setting may be; infinities and NaN never are.

    low, high  the smallest and the largest one
    above      low itself is not allowed
    also       one value outside the range that has a meaning of its own, such as -1 for "all"
    word       how that value is written, such as "auto"
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    also: int | None = None
    word: str = ""

    def allows(self, value: Any) -> bool:
        """Whether the number is allowed."""
        if self.also is not None and value == self.also:
            return True
        low_enough = math.isfinite(value) and value <= self.high
        return low_enough and (value > self.low if self.above else value >= self.low)

    @property
    def allowed(self) -> str:
        """The range in words: "at least 1, or -1"."""
        if self.low == -math.inf and self.high == math.inf:
            words = "finite"
        elif self.high == math.inf:
            words = f"above {self.low}" if self.above else f"at least {self.low}"
        elif self.above:
            words = f"above {self.low} and at most {self.high}"
        else:
            words = f"from {self.low} to {self.high}"
        return words if self.also is None else f"{words}, or {self.word or self.also}"

    def hint(self, value: Any) -> str:
        """Nothing is near a number."""
        return ""


@dataclass(frozen=True)
class Choices:
    """The words a setting may be, or a function that gives them.

    A function is called when a value is checked, so a table may grow until then.
    separator  of several words in one value; "" allows a single word. None at all is allowed too.
    also       whether a word outside the table is allowed too, such as the name of a file
    also_word  what such words are, for messages: "a file of problems"
    """

    words: Iterable[str] | Callable[[], Iterable[str]]
    separator: str = ""
    also: Callable[[str], bool] | None = None
    also_word: str = ""

    def known(self) -> tuple[str, ...]:
        """The words, in the order of their table."""
        return tuple(self.words() if callable(self.words) else self.words)

    def allows(self, value: Any) -> bool:
        """Whether the word, or each of several, is one of them."""
        return not self.unknown(value)

    def unknown(self, value: Any) -> list[str]:
        """The words of the value that are not among them."""
        words = str(value).split(self.separator) if self.separator and value else [str(value)]
        allowed = {*self.known(), ""} if self.separator else {*self.known()}
        also = self.also or (lambda word: False)
        return [word for word in words if word not in allowed and not also(word)]

    @property
    def allowed(self) -> str:
        """The words as a sentence has them: "stream or bestfit"."""
        *first, last = (*self.known(), *filter(None, [self.also_word]))
        words = f"{', '.join(first)} or {last}" if first else last
        return f"{words}; several between {self.separator}" if self.separator else words

    def hint(self, value: Any) -> str:
        """The word that was meant, probably."""
        near = nearest(self.unknown(value)[0], self.known())
        return f"; did you mean {near!r}?" if near else ""


Rule = Range | Choices

Count = Annotated[int, Range(1)]
AUTO = -1
CountOrAuto = Annotated[int, Range(1, also=AUTO, word="auto")]
CountOrZero = Annotated[int, Range(0)]
CountOrMinusOne = Annotated[int, Range(1, also=-1)]
Positive = Annotated[float, Range(0, above=True)]
PositiveOrMinusOne = Annotated[float, Range(0, above=True, also=-1)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Finite = Annotated[float, Range()]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Device = Annotated[str, Choices(("auto", "cuda", "mps", "cpu"))]


@dataclass(frozen=True)
class ModelSettings:
    """Settings of every script that uses a trained model; it may declare one of them again."""

    checkpoint: str = ""  # file, folder, tag or step; empty is the newest of the largest model
    model_tag: str = ""  # tag to look in when --checkpoint is empty or a step
    tokenizer_dir: str = ""  # folder of the tokenizer; empty is <base dir>/tokenizer
    device: Device = "auto"  # where to run; auto is CUDA, else MPS, else the CPU
    kernels: str = "auto"  # auto, reference, a name, or a list such as triton,attention=sdpa
    verbose: bool = False  # print why each operation runs as it does


def rule_of(hint: Any) -> Rule | None:
    """The Range or Choices of an annotation, None where it has neither."""
    found = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Rule)]
    return found[0] if found else None


def problem(value: Any, hint: Any) -> str:
    """What is wrong with a value of the right type: "must be at least 1"; "" where nothing is."""
    rule = rule_of(hint)
    if rule is None or value is None or rule.allows(value):
        return ""
    finite = not isinstance(value, float) or math.isfinite(value) or rule.allowed == "finite"
    return f"must be {'' if finite else 'finite and '}{rule.allowed}{rule.hint(value)}"


def number_of(value: Any, hint: Any) -> Any:
    """The number that a word of a Range stands for; any other value as it is."""
    rule = rule_of(hint)
    if isinstance(rule, Range) and rule.word and value == rule.word:
        return rule.also
    return value


def without_rule(settings_class: type) -> list[str]:
    """Numeric fields that any number could be given to; a test keeps this list empty."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    plain = typing.get_type_hints(settings_class)
    return [
        name
        for name, hint in hints.items()
        if {int, float} & {plain[name], *typing.get_args(plain[name])}
        and not isinstance(rule_of(hint), Range)
    ]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return close[0] if close else None


def near_miss(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the name that was meant, or all there are."""
    names = list(known)
    near = nearest(name, names)
    return f"; did you mean {near!r}?" if near else f"; known are {', '.join(names)}"


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError, with all that are known and the nearest, unless `name` is one of them."""
    choices = Choices(known)
    if not choices.allows(name):
        allowed = f"{choices.allowed}{choices.hint(name)}"
        raise ValueError(f"{what} {name!r} is unknown; choose {allowed}")
