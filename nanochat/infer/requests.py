"""What an engine is asked for and what it answers: requests, token events, calls of the tool."""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat.infer.calculator import use_calculator
from nanochat.infer.sampling import SamplingSettings
from nanochat.text.tokenizer_base import Tokenizer

logger = logging.getLogger(__name__)


class ScoredToken(NamedTuple):
    """A token with its log p under the model: temperature 1, nothing excluded.

    top  the likeliest tokens in its place with their log p, likeliest first, as many as asked for
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether the model gave it a probability: broken weights give NaN."""
        return not math.isnan(self.logprob)


@dataclass(frozen=True)
class Request:
    """A prompt, and how to answer it.

    max_tokens       tokens to generate, forced ones among them; None is as many as the context
                     holds; 0 only scores the prompt.
    stop_tokens      tokens that end the answer; None is <|assistant_end|> and <|bos|>.
    calculator       answer what stands between <|python_start|> and <|python_end|>.
    top_logprobs     how many of the likeliest tokens to report beside each token of the answer.
    prompt_logprobs  the same for each token of the prompt; None does not score the prompt.
    """

    tokens: Sequence[int]
    max_tokens: int | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    stop_tokens: Sequence[int] | None = None
    calculator: bool = True
    top_logprobs: int = 0
    prompt_logprobs: int | None = None

    def check(self, capacity: int, vocab_size: int) -> None:
        """Raises ValueError if a model of these sizes cannot answer."""
        if not 1 <= len(self.tokens) <= capacity:
            raise ValueError(
                f"a prompt of {len(self.tokens)} tokens: the context holds 1 to {capacity}; "
                "shorten it, or drop old turns with nanochat.serve.prompt.fit_prompt"
            )
        for token in (*self.tokens, *(self.stop_tokens or ())):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary, 0 to {vocab_size - 1}")
        least = 1 if self.prompt_logprobs is None else 0
        if self.max_tokens is not None and self.max_tokens < least:
            raise ValueError(f"max_tokens {self.max_tokens} must be at least {least}, or None")
        if min(self.top_logprobs, self.prompt_logprobs or 0) < 0:
            raise ValueError(
                f"top_logprobs {self.top_logprobs} and prompt_logprobs {self.prompt_logprobs} "
                "must not be negative"
            )


@dataclass(frozen=True)
class TokenEvent:
    """One token of an answer, or its end.

    token          None where the request was cancelled or failed, or only scored its prompt.
    mask           1: sampled; 0: forced by the tool.
    logprob        log p(token) under the model: temperature 1, nothing excluded.
    finish_reason  "" unless this is the last event: "stop" (`token` is the stop token), "length",
                   "cancelled" or "error".
    error          what went wrong, where that is the reason.
    top            as in ScoredToken.
    """

    token: int | None
    mask: int
    logprob: float
    finish_reason: str = ""
    error: str = ""
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Handle:
    """A submitted request and its events so far. Only the engine adds to it.

    prompt  the prompt's tokens but the first, scored, if the request asks for it; there before
            the first event.
    """

    request: Request
    on_event: Callable[[TokenEvent], None] | None = None
    events: list[TokenEvent] = field(default_factory=list)
    prompt: list[ScoredToken] = field(default_factory=list)
    cancelled: bool = False

    @property
    def finish_reason(self) -> str:
        """As in TokenEvent; "" while the request is not done."""
        return self.events[-1].finish_reason if self.events else ""

    @property
    def done(self) -> bool:
        """Whether the last event has come."""
        return bool(self.finish_reason)

    @property
    def answer(self) -> list[TokenEvent]:
        """Events of the answer proper: without the stop token."""
        return [
            event
            for event in self.events
            if event.token is not None and event.finish_reason in ("", "length")
        ]

    @property
    def tokens(self) -> list[int]:
        """Tokens of the answer: without the prompt and the stop token."""
        return [event.token for event in self.answer if event.token is not None]

    @property
    def masks(self) -> list[int]:
        """1 for each of `tokens` that was sampled, 0 where the tool forced it."""
        return [event.mask for event in self.answer]

    @property
    def logprobs(self) -> list[float]:
        """log p of each of `tokens`."""
        return [event.logprob for event in self.answer]

    def add(self, event: TokenEvent) -> None:
        """Append an event and tell the listener.

        A listener that raises, such as one whose event loop has closed, hears no more and its
        request is cancelled: the others are not to suffer from it.
        """
        self.events.append(event)
        if self.on_event is None:
            return
        try:
            self.on_event(event)
        except Exception:
            logger.exception("the listener of a request failed")
            self.on_event = None
            self.cancelled = True


class ToolCalls:
    """Watches the tokens of one answer for calls of the calculator.

    forced  tokens that must come next: what the calculator said, in its frame.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.forced: deque[int] = deque()
        self._tokenizer = tokenizer
        self._start = tokenizer.encode_special("<|python_start|>")
        self._end = tokenizer.encode_special("<|python_end|>")
        self._expression: list[int] | None = None

    def see(self, token: int) -> None:
        """Record a token; when a call that has a value ends, fill `forced`."""
        if token == self._start:
            self._expression = []  # collect until the end token; a second start begins again
        elif self._expression is None:
            return
        elif token == self._end:
            value = use_calculator(self._tokenizer.decode(self._expression))
            self._expression = None
            # no value (not arithmetic, or too large): the model continues without an output
            if value is not None:
                self.forced.extend(
                    self._tokenizer.encode(value, "<|output_start|>", "<|output_end|>")
                )
        else:
            self._expression.append(token)


def samples_of(
    tokens: Sequence[int],
    num_samples: int,
    max_tokens: int | None,
    temperature: float,
    top_k: int | None,
    seed: int,
    top_p: float,
) -> list[Request]:
    """Requests for independent answers to one prompt."""
    settings = (SamplingSettings(temperature, top_k, top_p, seed, i) for i in range(num_samples))
    return [Request(tokens, max_tokens, each) for each in settings]


def check_whole(handles: Sequence[Handle]) -> None:
    """Raises RuntimeError if a request was cancelled, or ended by an error in another thread."""
    for handle in handles:
        if handle.finish_reason in ("cancelled", "error"):
            raise RuntimeError(
                f"generation ended after {len(handle.tokens)} tokens: "
                f"{handle.events[-1].error or handle.finish_reason}"
            )
