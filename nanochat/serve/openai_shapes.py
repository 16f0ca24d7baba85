"""Answers in the shapes of OpenAI's two APIs, whole and in chunks.

Tokens that are no text by themselves, because they hold part of a character, are named after their
bytes, as OpenAI does: "bytes:\\xe2\\x98".
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from nanochat.infer.requests import ScoredToken
from nanochat.serve.answer import Piece, PlacedToken
from nanochat.text.tokenizer_base import Tokenizer


def event(data: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


class TokenNames:
    """Tokens as texts that tell them apart."""

    def __init__(self, tokenizer: Tokenizer, token_bytes: Sequence[bytes | None]) -> None:
        self.bytes = token_bytes
        self._special = {
            tokenizer.encode_special(name): name for name in tokenizer.get_special_tokens()
        }

    def name(self, token: int) -> str:
        """Of one token."""
        raw = self.bytes[token]
        if raw is None:
            return self._special[token]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def text(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """The text of tokens without the special ones, and the offset of each in it."""
        text, offsets, held = "", [], b""
        for token in tokens:
            offsets.append(len(text))
            held += self.bytes[token] or b""
            try:
                text, held = text + held.decode(), b""
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data":
                    text, held = text + held.decode(errors="replace"), b""
        return text + held.decode(errors="replace"), offsets


class Shape(ABC):
    """Collects the pieces of every choice; says how they look in chunks and as a whole."""

    object: str
    chunk_object: str
    prefix: str  # of the answer's id

    def __init__(self, names: TokenNames, logprobs: bool) -> None:
        self._names, self._logprobs = names, logprobs
        self._texts: dict[int, str] = {}
        self._tokens: dict[int, list[PlacedToken]] = {}
        self._reasons: dict[int, str] = {}

    def add(self, index: int, piece: Piece, prompt: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        """Keep a piece; returns the chunks it goes out in. Calls of the tool stay with us."""
        chunks = []
        if index not in self._texts:
            self._texts[index], self._tokens[index] = "", []
            chunks += self._begin(index, prompt)
        if piece.kind == "text" and (piece.text or piece.tokens):
            self._texts[index] += piece.text
            self._tokens[index] += piece.tokens
            chunks.append(self._chunk(index, piece.text, piece.tokens))
        if piece.finish_reason:
            self._reasons[index] = piece.finish_reason
            chunks.append(self._end(index, piece.finish_reason))
        return chunks

    @abstractmethod
    def whole(self, index: int) -> dict[str, Any]:
        """The choice, once its last piece has been added."""

    @abstractmethod
    def _begin(self, index: int, prompt: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        """The chunks before the first text of a choice."""

    @abstractmethod
    def _chunk(self, index: int, text: str, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        """A piece of text as a chunk."""

    @abstractmethod
    def _end(self, index: int, reason: str) -> dict[str, Any]:
        """The last chunk of a choice."""


class ChatShape(Shape):
    """POST /v1/chat/completions."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": self._texts[index], "refusal": None},
            "logprobs": self._logprobs_of(self._tokens[index]),
            "finish_reason": self._reasons[index],
        }

    def _begin(self, index: int, prompt: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def _chunk(self, index: int, text: str, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        return self._delta(index, {"content": text}, self._logprobs_of(tokens))

    def _end(self, index: int, reason: str) -> dict[str, Any]:
        return self._delta(index, {}, reason=reason)

    def _delta(self, index: int, delta: Any, logprobs: Any = None, reason: Any = None) -> Any:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_of(self, tokens: Sequence[PlacedToken]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {
                **self._token(scored.token, scored.logprob),
                "top_logprobs": [self._token(*pair) for pair in scored.top],
            }
            for scored, _ in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._names.bytes[token]
        name = self._names.name(token)
        return {"token": name, "logprob": logprob, "bytes": None if raw is None else list(raw)}


class CompletionShape(Shape):
    """POST /v1/completions.

    echo  tokens of the prompt of each choice, which its text begins with; None leaves them out.
    """

    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, names: TokenNames, logprobs: bool, echo: Sequence[Sequence[int]] | None
    ) -> None:
        super().__init__(names, logprobs)
        self._echo = echo
        self._prompts: dict[int, tuple[str, dict[str, list[Any]] | None]] = {}

    def whole(self, index: int) -> dict[str, Any]:
        text, logprobs = self._prompts[index]
        answer = self._logprobs_of(self._tokens[index], len(text))
        if logprobs is not None and answer is not None:
            logprobs = {name: column + answer[name] for name, column in logprobs.items()}
        reason = self._reasons[index]
        return self._choice(index, text + self._texts[index], logprobs or answer, reason)

    def _begin(self, index: int, prompt: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        if self._echo is None:
            self._prompts[index] = ("", None)
            return []
        tokens = self._echo[index]
        text, offsets = self._names.text(tokens)
        logprobs = None
        if self._logprobs:
            # nothing comes before the first token, so that it has no probability
            places = [PlacedToken(s, at) for s, at in zip(prompt, offsets[1:], strict=True)]
            logprobs = self._logprobs_of(places, 0)
            assert logprobs is not None
            first = (self._names.name(tokens[0]), None, None, 0)
            for column, value in zip(logprobs.values(), first, strict=True):
                column.insert(0, value)
        self._prompts[index] = (text, logprobs)
        return [self._choice(index, text, logprobs, None)]

    def _chunk(self, index: int, text: str, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        logprobs = self._logprobs_of(tokens, len(self._prompts[index][0]))
        return self._choice(index, text, logprobs, None)

    def _end(self, index: int, reason: str) -> dict[str, Any]:
        return self._choice(index, "", None, reason)

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_of(
        self, tokens: Sequence[PlacedToken], start: int
    ) -> dict[str, list[Any]] | None:
        """Columns, in the order of `first` in `_begin`; start, the offset of the answer's text."""
        if not self._logprobs:
            return None
        name = self._names.name
        return {
            "tokens": [name(scored.token) for scored, _ in tokens],
            "token_logprobs": [scored.logprob for scored, _ in tokens],
            "top_logprobs": [
                # the token itself is always among them
                {name(t): p for t, p in (*scored.top, (scored.token, scored.logprob))}
                for scored, _ in tokens
            ],
            "text_offset": [start + offset for _, offset in tokens],
        }
