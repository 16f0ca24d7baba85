"""What a chat needs around the engine: a prompt that fits the context, text out of tokens."""

import bisect
import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.text.chat_format import NO_LIMIT, render_conversation
from nanochat.text.tokenizer_base import Tokenizer


@dataclass(frozen=True)
class FittedPrompt:
    """Token ids up to the answer's first token, and how many old messages were left out."""

    tokens: list[int]
    num_dropped: int


def fit_prompt(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], max_tokens: int
) -> FittedPrompt:
    """The prompt for the answer to the last message, which is the user's, in max_tokens at most.

    The fewest possible of the oldest turns (a user's message and its answer) are dropped; a system
    message at the start stays.
    Raises  ValueError if the last message alone is too long, is not the user's, or if roles are
            out of turn.
    """
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the last message must be from the user, so that it can be answered")
    num_system = int(messages[0]["role"] == "system")
    system, turns = list(messages[:num_system]), list(messages[num_system:])

    def render(num_turns_dropped: int) -> list[int]:
        conversation = {"messages": system + turns[2 * num_turns_dropped :]}
        ids, _ = render_conversation(tokenizer, conversation, NO_LIMIT)
        return [*ids, tokenizer.encode_special("<|assistant_start|>")]

    render(0)  # raises for roles out of turn, also in messages that will be dropped
    # a prompt gets shorter with every turn dropped, so the fewest are found by bisection
    choices = range((len(turns) + 1) // 2)
    dropped = bisect.bisect_left(choices, True, key=lambda n: len(render(n)) <= max_tokens)
    if dropped == len(choices):
        raise ValueError(
            f"the last message takes {len(render(dropped - 1))} tokens with its frame; the context "
            f"leaves {max_tokens}: shorten it"
        )
    return FittedPrompt(render(dropped), 2 * dropped)


def special_tokens_parsed(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which the names of special tokens stand for these tokens.

    For texts of whoever runs the model: in a text of its users, names stay text.
    """
    names = "|".join(map(re.escape, sorted(tokenizer.get_special_tokens())))
    ids: list[int] = []
    for i, part in enumerate(re.split(f"({names})", text)):
        ids += [tokenizer.encode_special(part)] if i % 2 else tokenizer.encode(part)
    return ids


class TextDecoder:
    """Text of tokens as they come: a character appears with the last of its bytes.

    token_bytes  bytes of every id, None for special tokens, as in `Tokenizer.token_bytes`.
    Bytes that are not UTF-8 become replacement characters, as `Tokenizer.decode` has them.
    """

    def __init__(self, token_bytes: Sequence[bytes | None]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Text that a token completes; a special token has none of its own."""
        raw = self._token_bytes[token]
        return self.finish() if raw is None else self._decoder.decode(raw)

    def finish(self) -> str:
        """Replacement characters for bytes that were left; the decoder is as new."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
