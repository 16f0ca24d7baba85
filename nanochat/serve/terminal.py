"""A chat in a terminal: its conversation, its commands, how an answer looks.

Commands begin with a slash and are methods of Conversation named `do_...`, whose first line of
documentation is their help. Settings of the answers are commands too: /temperature 0.5.
"""

import dataclasses
import inspect
import json
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from nanochat.common import replace_file
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import SamplingSettings
from nanochat.serve.answer import AnswerReader
from nanochat.serve.prompt import fit_prompt
from nanochat.settings import Count, CountOrZero, NonNegative, Range, Seed, near_miss, problem

Show = Callable[[str, str], None]  # kind and text of a piece of an answer
FRAMES = {"text": "", "python": " [", "python_output": " = "}


@dataclass
class AnswerSettings:
    """How answers are drawn; each is a command."""

    temperature: NonNegative = 0.6
    top_k: CountOrZero = 50
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    max_tokens: Count = 256
    seed: Seed = 42


@dataclass(frozen=True)
class Answer:
    """One answer and what it took; finish_reason is "stop", "length" or "stopped" by the user."""

    content: str | list[dict[str, Any]]
    finish_reason: str
    num_prompt: int
    num_generated: int
    num_dropped: int
    first_token_seconds: float
    seconds: float

    @property
    def text(self) -> str:
        """What the assistant says, without its tool."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content if part["type"] == "text")

    def as_json(self) -> str:
        """One line."""
        return json.dumps({"response": self.text, **dataclasses.asdict(self)}, ensure_ascii=False)


class Leave(Exception):  # noqa: N818 - not an error
    """The user has had enough."""


class Conversation:
    """Messages so far, the settings of the next answer, and what the last one took."""

    def __init__(self, engine: Engine, settings: AnswerSettings, about: str = "") -> None:
        self.engine, self.settings, self.about = engine, settings, about
        self.system = ""
        self.messages: list[dict[str, Any]] = []
        self.last: Answer | None = None

    def answer(self, text: str, show: Show) -> Answer:
        """The answer to what the user says, shown as it comes; Ctrl-C stops it.

        A question that has got no answer is forgotten.
        Raises  ValueError if the text is too long for the context; RuntimeError if the engine
                failed.
        """
        settings, engine = self.settings, self.engine
        messages = [*self.messages, {"role": "user", "content": text}]
        room = max(1, engine.capacity - settings.max_tokens)
        head = [{"role": "system", "content": self.system}] if self.system else []
        fitted = fit_prompt(engine.tokenizer, [*head, *messages], room)
        # the length of the conversation selects the random numbers: other ones in every turn, the
        # same ones in every run
        sampling = SamplingSettings(
            settings.temperature, settings.top_k, settings.top_p, settings.seed, len(messages)
        )
        request = Request(fitted.tokens, settings.max_tokens, sampling)
        reader, reason = AnswerReader(engine.tokenizer), "stopped"
        began, first, count = time.monotonic(), 0.0, 0
        try:
            for event in engine.stream(request):
                first = first or time.monotonic() - began
                reason = event.finish_reason
                if event.token is None:
                    raise RuntimeError(f"the generation failed: {event.error or reason}")
                count += 1
                if reason != "stop":
                    show(*reader.add(event.token))
        except KeyboardInterrupt:
            reason = "stopped"
        show(*reader.finish())
        seconds = time.monotonic() - began
        answer = Answer(
            reader.content, reason, len(fitted.tokens), count, fitted.num_dropped, first, seconds
        )
        if answer.content:
            self.messages = [*messages, {"role": "assistant", "content": answer.content}]
        self.last = answer
        return answer

    def command(self, line: str) -> str:
        """Carry out "/name argument"; returns what to tell the user.

        Raises  ValueError for an unknown command or a value that is not allowed; Leave.
        """
        name, _, argument = line.removeprefix("/").partition(" ")
        if name in self.commands():
            return self.commands()[name](argument.strip())
        hints = typing.get_type_hints(AnswerSettings, include_extras=True)
        if name not in hints:
            known = [f"/{each}" for each in (*self.commands(), *hints)]
            raise ValueError(f"unknown command /{name}{near_miss(f'/{name}', known)}; see /help")
        if argument.strip():
            self._set(name, argument.strip(), hints[name])
        return f"{name} = {getattr(self.settings, name)}"

    def _set(self, name: str, text: str, hint: Any) -> None:
        kind = typing.get_args(hint)[0]
        try:
            value = kind(text)
        except ValueError as error:
            raise ValueError(f"/{name} {text}: wanted a number ({kind.__name__})") from error
        if wrong := problem(value, hint):
            raise ValueError(f"/{name} {text} {wrong}")
        setattr(self.settings, name, value)

    def commands(self) -> dict[str, Callable[[str], str]]:
        """Every command but the settings, by name."""
        found = inspect.getmembers(self, inspect.ismethod)
        return {name[3:]: method for name, method in found if name.startswith("do_")}

    def do_help(self, argument: str) -> str:
        """print this"""
        lines = [f"/{name:<12} {method.__doc__}" for name, method in self.commands().items()]
        for name, value in vars(self.settings).items():
            lines.append(f"/{name:<12} show or set it, as /{name} {value}")
        lines.append("Alt+Enter breaks the line, Ctrl-C stops an answer, Ctrl-D leaves")
        return "\n".join(lines)

    def do_new(self, argument: str) -> str:
        """forget the conversation; /clear does the same"""
        self.messages = []
        return "a new conversation"

    def do_clear(self, argument: str) -> str:
        """forget the conversation"""
        return self.do_new(argument)

    def do_system(self, argument: str) -> str:
        """show or set what the model is told first; /system - tells it nothing"""
        if argument:
            self.system = "" if argument == "-" else argument
        return f"system: {self.system or '(nothing)'}"

    def do_save(self, argument: str) -> str:
        """write the conversation to a file, as training data has it: /save chat.jsonl"""
        if not argument:
            raise ValueError("/save needs the name of a file")
        head = [{"role": "system", "content": self.system}] if self.system else []
        path = Path(argument).expanduser()
        replace_file(path, json.dumps([*head, *self.messages], ensure_ascii=False) + "\n")
        return f"saved {len(self.messages)} messages to {path}"

    def do_stats(self, argument: str) -> str:
        """model, context, speed of the last answer"""
        lines = [self.about] if self.about else []
        if self.last is None:
            return "\n".join([*lines, f"context: {self.engine.capacity} tokens, none used"])
        last, capacity = self.last, self.engine.capacity
        used = min(capacity, last.num_prompt + last.num_generated)
        rest = last.seconds - last.first_token_seconds
        rate = f"{(last.num_generated - 1) / rest:.1f} tokens/s" if last.num_generated > 1 else "-"
        return "\n".join(
            [
                *lines,
                f"context: {used} of {capacity} tokens used, {last.num_dropped} messages dropped",
                f"last answer: {last.num_generated} tokens, {last.finish_reason}; first after "
                f"{1000 * last.first_token_seconds:.0f} ms, then {rate}",
            ]
        )

    def do_quit(self, argument: str) -> str:
        """leave; so do /exit and Ctrl-D"""
        raise Leave

    def do_exit(self, argument: str) -> str:
        """leave"""
        raise Leave


class Printer:
    """Writes an answer, calls of the tool as [2*3 = 6]."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write = write
        self._kind = "text"

    def show(self, kind: str, piece: str) -> None:
        """Some more of it."""
        if piece:
            self._turn_to(kind)
            self._write(piece)

    def finish(self) -> None:
        """Close what is open."""
        self._turn_to("text")

    def _turn_to(self, kind: str) -> None:
        if kind != self._kind:
            ends = self._kind != "text" and kind != "python_output"
            self._write("]" * ends + FRAMES[kind])
            self._kind = kind
