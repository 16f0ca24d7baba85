"""An answer as it comes: its tokens sorted into text, calls of the tool, and what the tool said."""

from typing import Any

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
    """Collects an answer as the content of a message: a text, or parts once the tool was called."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._begins = {tokenizer.encode_special(name): kind for name, kind in BEGINS.items()}
        self._decoder = TextDecoder(tokenizer.token_bytes())
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
