"""Conversations -> token batches, for mid-training and fine-tuning; resumed exactly.

stream   conversations one after the other, cut into rows anywhere; every token is a target, as in
         pretraining
padded   one conversation per row, only the assistant's tokens are targets
packed   as padded, with as many whole conversations in a row as fit (best fit)

Three conversations A, B, C of 4, 7 and 5 tokens in rows of sequence_len + 1 = 9 tokens, of which
the first 8 are inputs and the last 8 targets; e is <|assistant_end|> as filler, never a target:

    stream   A A A A B B B B B     rows overlap by one token: the last target of a row is the
             B B B C C C C C .     first input of the next
    padded   A A A A e e e e e
             B B B B B B B e e
             C C C C C e e e e
    packed   B B B B B B B e e     the longest first, then what fits the rest
             C C C C C A A A A
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.data.dataloader import Batch
from nanochat.kernels.linear_cross_entropy import IGNORE_INDEX
from nanochat.settings import require_known
from nanochat.text.chat_format import NO_LIMIT, Conversation, render_conversation
from nanochat.text.tokenizer_base import Tokenizer

PACKINGS = ("stream", "padded", "packed")
PACKING_BUFFER = 64  # conversations to choose from when a row is filled
ESTIMATE_SAMPLE = 512  # conversations whose length is measured to estimate that of an epoch


@dataclass(frozen=True)
class Rendered:
    """Token ids of one conversation, and 1 where a token is a target."""

    ids: list[int]
    mask: list[int]


def render_to_fit(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int) -> Rendered:
    """As many whole turns as fit max_tokens; if not even the first fits, a part of it."""
    ids, mask = render_conversation(tokenizer, conversation, NO_LIMIT)
    if len(ids) <= max_tokens:
        return Rendered(ids, mask)
    turn_end = tokenizer.encode_special("<|assistant_end|>")
    ends = [i + 1 for i, token in enumerate(ids[:max_tokens]) if token == turn_end]
    length = ends[-1] if ends else max_tokens
    return Rendered(ids[:length], mask[:length])


def estimate_tokens(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> int:
    """Tokens of all conversations, from the lengths of evenly spaced ones."""
    stride = max(1, len(conversations) // ESTIMATE_SAMPLE)
    indices = range(0, len(conversations), stride)
    lengths = [len(render_conversation(tokenizer, conversations[i], NO_LIMIT)[0]) for i in indices]
    return round(sum(lengths) / len(lengths) * len(conversations))


class ConversationLoader:
    """Endless iterator of Batch over this rank's share of the conversations, in their order.

    conversations  a sequence such as a TaskMixture, shuffled already; rank r takes r, r + W, ...
    state          of a batch: the next batch is the one that followed it.
    Raises  ValueError for an unknown packing, no conversations, a state of other conversations, or
            a pass over all conversations without one target.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        packing: str,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        require_known("packing", packing, PACKINGS)
        if len(conversations) == 0:
            raise ValueError("there are no conversations to train on")
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.sequence_len = sequence_len
        self.packing = packing
        self.rank = rank
        self.world_size = world_size
        self.position = 0  # conversations this rank has taken
        self.waiting: list[Rendered] = []  # taken, not yet in a row
        self.identity = {"num_conversations": len(conversations), "packing": packing}
        if state is not None:
            for name, value in self.identity.items():
                if state[name] != value:
                    raise ValueError(
                        f"the saved run trained on {name} {state[name]!r}, this one would on "
                        f"{value!r}; start from scratch, or use the settings of the saved run"
                    )
            self.position = state["position"]
            self.waiting = [Rendered(ids, mask) for ids, mask in state["waiting"]]

    def __iter__(self) -> "ConversationLoader":
        return self

    def __next__(self) -> Batch:
        rows = [self._row() for _ in range(self.batch_size)]
        # shift by one, and blank out the targets that the loss must ignore
        inputs = torch.tensor([ids[:-1] for ids, _ in rows])
        targets = torch.tensor([ids[1:] for ids, _ in rows])
        trained = torch.tensor([mask[1:] for _, mask in rows], dtype=torch.bool)
        targets = targets.masked_fill(~trained, IGNORE_INDEX)
        return Batch(inputs, targets, self._state())

    def close(self) -> None:
        """Nothing is held open; here so that every loader can be closed."""

    def _state(self) -> dict[str, Any]:
        waiting = [(rendered.ids, rendered.mask) for rendered in self.waiting]
        return self.identity | {"position": self.position, "waiting": waiting}

    def _take(self) -> Rendered:
        """The next conversation with a target in it."""
        max_tokens = NO_LIMIT if self.packing == "stream" else self.sequence_len + 1
        for _ in range(len(self.conversations)):
            index = (self.position * self.world_size + self.rank) % len(self.conversations)
            self.position += 1
            rendered = render_to_fit(self.tokenizer, self.conversations[index], max_tokens)
            if self.packing == "stream" or any(rendered.mask[1:]):
                return rendered
        raise ValueError(
            f"none of {len(self.conversations)} conversations has a token of the assistant within "
            f"{self.sequence_len} tokens; lengthen the context or look at the data"
        )

    def _row(self) -> tuple[list[int], list[int]]:
        """sequence_len + 1 ids and their mask."""
        wanted = self.sequence_len + 1
        if self.packing == "stream":
            return self._stream_row(wanted)
        parts = [self._take()] if self.packing == "padded" else self._best_fit(wanted)
        ids = [token for part in parts for token in part.ids]
        # A conversation's first token, BOS, is not a target: the input before it is the end of
        # another conversation.
        mask = [bit for part in parts for bit in (0, *part.mask[1:])]
        padding = wanted - len(ids)
        filler = self.tokenizer.encode_special("<|assistant_end|>")
        return ids + [filler] * padding, mask + [0] * padding

    def _stream_row(self, wanted: int) -> tuple[list[int], list[int]]:
        """Rows overlap by one token: the last target of one is the first input of the next."""
        while sum(len(rendered.ids) for rendered in self.waiting) < wanted:
            self.waiting.append(self._take())
        ids = [token for rendered in self.waiting for token in rendered.ids]
        # what is left, with the token that both rows share, waits for the next row
        rest = ids[wanted - 1 :]
        self.waiting = [Rendered(rest, [1] * len(rest))]
        return ids[:wanted], [1] * wanted

    def _best_fit(self, room: int) -> list[Rendered]:
        """Conversations for one row: the longest in the buffer that fits, until none does."""
        parts: list[Rendered] = []
        while True:
            while len(self.waiting) < PACKING_BUFFER:
                self.waiting.append(self._take())
            fitting = [i for i, r in enumerate(self.waiting) if len(r.ids) <= room]
            if not fitting:
                return parts
            longest = max(fitting, key=lambda i: len(self.waiting[i].ids))
            parts.append(self.waiting.pop(longest))
            room -= len(parts[-1].ids)
