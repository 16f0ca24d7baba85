"""The slots on the device: one key/value cache, and what each slot's next token depends on.

Prefill fills slots with the keys and values of prompts; decoding feeds every slot its last token
and draws the next. Sampling and the test for the end run on the device; one transfer per step
brings the results to the host.

Letters  B rows: the slots up to the last one in use; T positions of a prompt; C model width;
         V vocabulary; K alternatives reported beside each token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.gpt import GPT, KVCache
from nanochat.infer.requests import Request, ScoredToken
from nanochat.infer.sampling import SamplingRows, sample

SPAN_STEP = 64  # attention reads the cache up to a multiple of this: few shapes, little waste
NOT_FORCED = -1
SCORED_LOGITS = 2**24  # held at a time while a prompt is scored: 64 MiB in float32


class Drawn(NamedTuple):
    """The next token of a slot, and whether it is the slot's last."""

    token: ScoredToken
    finished: bool


class Slots:
    """Device state of `num_slots` requests, up to `model.config.sequence_len` positions each."""

    def __init__(self, model: GPT, num_slots: int) -> None:
        device, vocab_size = model.device, model.config.vocab_size
        self.model, self.capacity = model, model.config.sequence_len
        self._cache = KVCache(model.config, num_slots, self.capacity, device, model.dtype)
        self._rows = SamplingRows(num_slots, vocab_size, device)
        self._stops = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self._limits = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._last = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._active = torch.zeros(num_slots, dtype=torch.bool, device=device)

    def occupy(self, slot: int, request: Request, stop_tokens: Sequence[int]) -> None:
        """Let a slot answer a request; its prompt but the last token is filled in afterwards."""
        room = self.capacity - len(request.tokens) + 1  # the last token drawn need not be fed
        self._limits[slot] = room if request.max_tokens is None else min(request.max_tokens, room)
        self._stops[slot] = False
        self._stops[slot, list(stop_tokens)] = True
        self._last[slot] = request.tokens[-1]
        self._rows.assign(slot, request.sampling)
        self._active[slot] = True

    def release(self, slots: list[int]) -> None:
        """Free slots before they have drawn their last token."""
        self._active[slots] = False
        self._cache.lengths[slots] = 0

    def clean(self, slots: list[int]) -> None:
        """Free slots whose contents cannot be trusted, and forget them.

        Masked positions still take part in attention with weight 0, and 0 * NaN is NaN: what a
        failure has left would reach the next request.
        """
        self.release(slots)
        self._cache.keys[:, slots] = 0
        self._cache.values[:, slots] = 0

    def copy(self, holder: int, slot: int, length: int) -> None:
        """Begin a slot with the first `length` positions of another."""
        self._cache.fill([slot], self._cache, holder, length)

    def prefill(self, prompts: dict[tuple[int, ...], list[int]]) -> Tensor:
        """Keys and values of prompts, padded on the right, into their slots.

        Returns  final states (prompts, T, C)
        """
        width = max(1, *map(len, prompts))
        device = self.model.device
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        cache = KVCache(self.model.config, len(prompts), width, device, self.model.dtype)
        states = self.model.hidden(torch.tensor(padded, device=device), cache)
        for row, (prompt, slots) in enumerate(prompts.items()):
            self._cache.fill(slots, cache, row, len(prompt))
        return states

    def score(self, states_TC: Tensor, tokens: Sequence[int], num_top: int) -> list[ScoredToken]:
        """log p of each token given the state before it, with the num_top likeliest instead."""
        scored: list[ScoredToken] = []
        step = max(1, SCORED_LOGITS // self.model.config.vocab_size)
        for start in range(0, len(tokens), step):
            ids = torch.tensor(tokens[start : start + step], device=states_TC.device)
            logits_TV = self.model.head(states_TC[start : start + len(ids)])
            scored += _scored(_with_logprobs(logits_TV, ids, num_top).tolist(), num_top)
        return scored

    def decode(
        self, B: int, longest: int, forced_B: list[int], num_candidates: int, num_top: int
    ) -> list[Drawn]:
        """Draw, or be forced to take, the next token of the first B slots.

        longest         positions of the fullest of them after this step.
        forced_B        a token each, or NOT_FORCED.
        num_candidates  largest `SamplingSettings.num_candidates` of the slots.
        """
        span = min(self.capacity, -(-longest // SPAN_STEP) * SPAN_STEP)
        cache = self._cache.view(B, span)
        logits_BV = self.model.head(self.model.hidden(self._last[:B, None], cache)[:, -1])
        next_B = sample(logits_BV, self._rows, num_candidates)
        if max(forced_B) != NOT_FORCED:
            forcing = torch.tensor(forced_B, device=next_B.device)
            next_B = torch.where(forcing == NOT_FORCED, next_B, forcing)
        self._rows.position[:B] += 1
        stopped_B = self._stops[:B].gather(1, next_B[:, None])[:, 0]
        finished_B = stopped_B | (self._rows.position[:B] >= self._limits[:B])
        self._last[:B] = next_B
        self._active[:B] &= ~finished_B
        cache.lengths *= self._active[:B]  # free slots write to position 0, again and again
        # one transfer: float32 holds the ids of any vocabulary below 2^24
        logprobs = _with_logprobs(logits_BV, next_B, num_top)
        rows = torch.cat((finished_B.float()[:, None], logprobs), dim=1).tolist()
        scored = _scored([row[1:] for row in rows], num_top)
        return [Drawn(token, bool(row[0])) for token, row in zip(scored, rows, strict=True)]


def _with_logprobs(logits_BV: Tensor, ids_B: Tensor, num_top: int) -> Tensor:
    """Columns: id, its log p, then num_top ids and their log p, likeliest first; (B, 2 + 2 K)."""
    total_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
    columns = [ids_B[:, None].float(), logits_BV.gather(1, ids_B[:, None]) - total_B1]
    if num_top:
        top = logits_BV.topk(min(num_top, logits_BV.shape[1]))
        columns += [top.indices.float(), top.values - total_B1]
    return torch.cat(columns, dim=1)


def _scored(rows: list[list[float]], num_top: int) -> list[ScoredToken]:
    """Rows of `_with_logprobs`, on the host."""
    scored = []
    for token, logprob, *top in rows:
        half = len(top) // 2
        pairs = zip(map(int, top[:half]), top[half:], strict=True)
        scored.append(ScoredToken(int(token), logprob, tuple(pairs)))
    return scored
