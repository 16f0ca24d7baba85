"""An answer as it comes: tokens sorted into text, calls of the tool and what the tool said, and
text that ends before the first stop string.

A token's text may come with a later token (a character of several bytes), and text that could be
the beginning of a stop string is held back until it cannot. With the stop string "END":

    token   "x"    " E"    "N"     "a"        "END"
    piece   "x"    " "     ""      "ENa"      "", stopped
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from nanochat.infer.requests import ScoredToken
from nanochat.serve.prompt import TextDecoder
from nanochat.text.tokenizer_base import Tokenizer

# special token -> kind of the part that it begins
BEGINS = {
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}


class AnswerReader:
    """Collects an answer as the content of a message: a text, or parts once the tool was called.

    token_bytes  of the tokenizer, where they are at hand: they take long to list.
    """

    def __init__(
        self, tokenizer: Tokenizer, token_bytes: Sequence[bytes | None] | None = None
    ) -> None:
        self._begins = {tokenizer.encode_special(name): kind for name, kind in BEGINS.items()}
        self._decoder = TextDecoder(token_bytes or tokenizer.token_bytes())
        self._kind = "text"
        self.parts: list[dict[str, str]] = []

    def add(self, token: int) -> tuple[str, str]:
        """Kind ("text", "python" or "python_output") and text that the token completes."""
        kind = self._kind
        piece = self._decoder.add(token)
        self._keep(kind, piece)
        self._kind = self._begins.get(token, kind)
        return kind, piece

    def finish(self) -> tuple[str, str]:
        """What was left of an unfinished character."""
        piece = self._decoder.finish()
        self._keep(self._kind, piece)
        return self._kind, piece

    @property
    def content(self) -> str | list[dict[str, Any]]:
        """For the message of the assistant that goes into the history."""
        if all(part["type"] == "text" for part in self.parts):
            return "".join(part["text"] for part in self.parts)
        return [dict(part) for part in self.parts]

    def _keep(self, kind: str, piece: str) -> None:
        if not piece:
            return
        if self.parts and self.parts[-1]["type"] == kind:
            self.parts[-1]["text"] += piece
        else:
            self.parts.append({"type": kind, "text": piece})


class StopStrings:
    """Lets text pass until a stop string is complete, wherever the text was cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=1)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether it ends here: before the stop string that is
        complete first, or before the longest of those."""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown, True
        kept = next(
            n
            for n in range(min(self._longest - 1, len(self._held)), -1, -1)
            if not n or any(stop.startswith(self._held[-n:]) for stop in self._stops)
        )
        cut = len(self._held) - kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown


class PlacedToken(NamedTuple):
    """A token of visible text and the offset of its first character."""

    scored: ScoredToken
    offset: int


class Piece(NamedTuple):
    """Some more of an answer.

    kind           "text", or what the assistant's tool was told ("python") or said
                   ("python_output").
    tokens         those whose text is complete with this piece.
    finish_reason  "stop" or "length" in an answer's last piece.
    """

    kind: str
    text: str
    tokens: tuple[PlacedToken, ...] = ()
    finish_reason: str = ""


class AnswerPieces:
    """Tokens in, pieces out.

    raw  a document to be continued, not a message: nothing in it calls the tool, and every token is
         reported, also the one that stops it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        token_bytes: Sequence[bytes | None],
        stops: Sequence[str] = (),
        raw: bool = False,
    ) -> None:
        self._reader = AnswerReader(tokenizer, token_bytes)
        self._bytes = token_bytes
        self._stops = StopStrings(stops)
        self._raw = raw
        self._pending: deque[tuple[PlacedToken, int]] = deque()  # with the end of its text
        self._received = self._shown = 0  # characters of visible text

    def add(self, scored: ScoredToken, finish_reason: str) -> list[Piece]:
        """Pieces that the token completes; the last one says so if the answer ends with it.

        finish_reason  of the token's event; a stop string makes it "stop".
        """
        if finish_reason == "stop":  # the token that stops an answer is not part of it
            if self._raw:
                self._pending.append((PlacedToken(scored, self._received), self._received))
            return self._finish(finish_reason)
        kind, text = self._reader.add(scored.token)
        special = self._bytes[scored.token] is None
        if kind != "text" and not self._raw:
            found = [Piece(kind, text)] if text else []
            return found + self._finish(finish_reason) if finish_reason else found
        if self._raw or not special:
            place = PlacedToken(scored, self._received)
            self._pending.append((place, self._received + len(text)))
        pieces = self._show(text)
        if finish_reason and not (pieces and pieces[-1].finish_reason):
            pieces += self._finish(finish_reason)
        return pieces

    def _show(self, text: str) -> list[Piece]:
        self._received += len(text)
        shown, stopped = self._stops.add(text)
        self._shown += len(shown)
        if stopped:
            # tokens that begin before the stop string belong to the answer
            tokens = [place for place, _ in self._pending if place.offset < self._shown]
            self._pending.clear()
            return [Piece("text", shown, tuple(tokens), "stop")]
        return self._piece(shown)

    def _finish(self, reason: str) -> list[Piece]:
        kind, text = self._reader.finish()
        pieces = []
        if kind != "text" and not self._raw:
            pieces = [Piece(kind, text)] if text else []
        else:
            pieces = self._show(text)
            if pieces and pieces[-1].finish_reason:
                return pieces
        shown = self._stops.finish()
        self._shown += len(shown)
        tokens = tuple(place for place, _ in self._pending)
        return [*pieces, Piece("text", shown, tokens, reason)]

    def _piece(self, shown: str) -> list[Piece]:
        tokens = []
        while self._pending and self._pending[0][1] <= self._shown:
            tokens.append(self._pending.popleft()[0])
        return [Piece("text", shown, tuple(tokens))] if shown or tokens else []
