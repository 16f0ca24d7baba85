"""Generation: requests share the slots of one key/value cache and are decoded together.

    submit -> waits for a slot -> prefill: the prompt but its last token -> one token a step

Two slots and three requests A, B, C with answers of 2, 4 and 2 tokens:

    step   slot 0            slot 1            waiting
    1      prefill A, a1     prefill B, b1     C
    2      a2 (ends)         b2                C
    3      prefill C, c1     b3
    4      c2 (ends)         b4 (ends)

A step evicts what was cancelled, admits what waits, feeds every slot its last token and draws the
next. Sampling and the test for the end run on the device; one transfer per step brings the tokens
to the host, where the calculator answers: its tokens are forced upon the row, one per step.
A request's tokens depend on its prompt and settings, not on its slot or the requests beside it, up
to the rounding of matrix products, which differs between batch sizes.

Letters  B rows: the slots up to the last one in use; V vocabulary.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nanochat.gpt import GPT, KVCache
from nanochat.infer.requests import Handle, Request, TokenEvent, ToolCalls, check_whole, samples_of
from nanochat.infer.sampling import SamplingRows, sample
from nanochat.infer.weights import cast_weights
from nanochat.text.tokenizer_base import Tokenizer

SPAN_STEP = 64  # attention reads the cache up to a multiple of this: few shapes, little waste
NOT_FORCED = -1
STOP_NAMES = ("<|assistant_end|>", "<|bos|>")


@dataclass
class _Slot:
    handle: Handle
    prefix: tuple[int, ...]  # the prompt but its last token; its keys and values begin the slot
    length: int  # positions in the cache
    tools: ToolCalls | None


class Engine:
    """Generates with a model; any method may be called from any thread.

    num_slots       requests decoded at once; the others wait.
    prefill_tokens  positions, padding included, that one step prefills at most (but one prompt).
    Raises          ValueError for sizes below 1.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, num_slots: int = 16, prefill_tokens: int = 4096
    ) -> None:
        if num_slots < 1 or prefill_tokens < 1:
            raise ValueError(f"{num_slots=} and {prefill_tokens=} must be at least 1")
        self.source, self.model = model, cast_weights(model)
        self.tokenizer = tokenizer
        self.num_slots, self.prefill_tokens = num_slots, prefill_tokens
        self.capacity = model.config.sequence_len
        self.vocab_size = model.config.vocab_size
        self.stop_tokens = tuple(tokenizer.encode_special(name) for name in STOP_NAMES)

        device = model.device
        self._cache = KVCache(model.config, num_slots, self.capacity, device, model.dtype)
        self._rows = SamplingRows(num_slots, self.vocab_size, device)
        self._stops = torch.zeros(num_slots, self.vocab_size, dtype=torch.bool, device=device)
        self._limits = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._last = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._active = torch.zeros(num_slots, dtype=torch.bool, device=device)

        self._slots: list[_Slot | None] = [None] * num_slots
        self._waiting: deque[Handle] = deque()
        self._any_cancelled = False
        self._step_lock = threading.Lock()
        self._queue_lock = threading.Lock()
        self._work = threading.Event()

    @property
    def num_active(self) -> int:
        """Requests that have a slot."""
        return sum(slot is not None for slot in self._slots)

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    @torch.no_grad()
    def update_weights(self) -> None:
        """Copy the weights of the model that the engine was made with, after it has been trained.

        Running requests keep the keys and values that the old weights computed.
        """
        with self._step_lock:
            if self.model is not self.source:
                self.model.load_state_dict(self.source.state_dict())

    def submit(
        self, request: Request, on_event: Callable[[TokenEvent], None] | None = None
    ) -> Handle:
        """Queue a request; it progresses while any thread calls `step`.

        on_event  called with every event by the thread that steps; must neither raise nor block.
        Raises    ValueError for a request that this model cannot answer.
        """
        request.check(self.capacity, self.vocab_size)
        handle = Handle(request, on_event)
        with self._queue_lock:
            self._waiting.append(handle)
        self._work.set()
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request at the next step; nothing happens if it is done."""
        if not handle.done:
            handle.cancelled = self._any_cancelled = True
            self._work.set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a step has something to do; False if nothing came in time."""
        return self._work.wait(timeout_s)

    @torch.inference_mode()
    def step(self) -> bool:
        """One token for every request that has a slot; False if there is nothing to do.

        Whatever is raised ends all requests with "error" first; the next ones can be answered.
        """
        with self._step_lock:
            self._work.clear()
            succeeded = False
            try:
                if self._any_cancelled:
                    self._any_cancelled = False
                    self._end(lambda handle: handle.cancelled, "cancelled")
                self._admit()  # before decoding: a new request gets its first token in this step
                busy = self.num_active > 0
                if busy:
                    self._decode()
                succeeded = True
                return busy
            finally:
                if not succeeded:
                    self._end(lambda handle: True, "error")

    def _end(self, chosen: Callable[[Handle], bool], reason: str) -> None:
        ended = []
        freed = []
        for index, slot in enumerate(self._slots):
            if slot is not None and chosen(slot.handle):
                self._slots[index] = None
                ended.append(slot.handle)
                freed.append(index)
        with self._queue_lock:
            ended += [handle for handle in self._waiting if chosen(handle)]
            self._waiting = deque(handle for handle in self._waiting if not chosen(handle))
        for handle in ended:
            handle.add(TokenEvent(None, 0, 0.0, reason))
        if freed:
            self._active[freed] = False
            self._cache.lengths[freed] = 0

    def _admit(self) -> None:
        """Fill free slots from the queue; a prompt is prefilled once for all its slots."""
        fresh: dict[tuple[int, ...], list[int]] = {}
        while None in self._slots:
            with self._queue_lock:
                if not self._waiting:
                    break
                prefix = tuple(self._waiting[0].request.tokens[:-1])
                longest = max(map(len, (*fresh, prefix)))
                if fresh and (len(fresh) + 1) * longest > self.prefill_tokens:
                    break
                handle = self._waiting.popleft()
            # Is the same prompt in the cache already, or about to be prefilled for another slot?
            holder = next((i for i, s in enumerate(self._slots) if s and s.prefix == prefix), None)
            slot = self._slots.index(None)
            self._occupy(slot, handle, prefix)
            if holder is None or prefix in fresh:
                fresh.setdefault(prefix, []).append(slot)
            else:
                self._cache.fill([slot], self._cache, holder, len(prefix))
        if fresh:
            self._prefill(fresh)

    def _occupy(self, index: int, handle: Handle, prefix: tuple[int, ...]) -> None:
        request = handle.request
        tools = ToolCalls(self.tokenizer) if request.calculator else None
        self._slots[index] = _Slot(handle, prefix, len(prefix), tools)
        room = self.capacity - len(prefix)
        self._limits[index] = min(request.max_tokens or room, room)
        self._stops[index] = False
        self._stops[index, list(self._stops_of(request))] = True
        self._last[index] = request.tokens[-1]
        self._rows.assign(index, request.sampling)
        self._active[index] = True

    def _stops_of(self, request: Request) -> Sequence[int]:
        return self.stop_tokens if request.stop_tokens is None else request.stop_tokens

    def _prefill(self, fresh: dict[tuple[int, ...], list[int]]) -> None:
        """Keys and values of new prompts, padded on the right, into their slots."""
        width = max(1, *map(len, fresh))
        device = self.model.device
        padded = [[*prefix, *[0] * (width - len(prefix))] for prefix in fresh]
        cache = KVCache(self.model.config, len(fresh), width, device, self.model.dtype)
        self.model.hidden(torch.tensor(padded, device=device), cache)
        for row, (prefix, slots) in enumerate(fresh.items()):
            self._cache.fill(slots, cache, row, len(prefix))

    def _decode(self) -> None:
        # On the device: rows up to the last used slot, positions up to the longest one, rounded up
        # to keep the number of shapes small.
        used = {index: slot for index, slot in enumerate(self._slots) if slot is not None}
        B = max(used) + 1
        longest = max(slot.length for slot in used.values()) + 1
        span = min(self.capacity, -(-longest // SPAN_STEP) * SPAN_STEP)
        forced = {i: slot.tools.forced for i, slot in used.items() if slot.tools}
        forced_B = [forced[i].popleft() if forced.get(i) else NOT_FORCED for i in range(B)]
        candidates = max(
            slot.handle.request.sampling.num_candidates(self.vocab_size) for slot in used.values()
        )
        tokens, finished, logprobs = self._decode_on_device(B, span, forced_B, candidates)
        # On the host: tool calls, events, and free the slots of what has ended.
        for index, slot in used.items():
            slot.length += 1
            token = int(tokens[index])
            sampled = forced_B[index] == NOT_FORCED
            if slot.tools:
                slot.tools.see(token)
            reason = ""
            if finished[index]:
                self._slots[index] = None
                stopped = token in self._stops_of(slot.handle.request)
                reason = "stop" if stopped else "length"
            slot.handle.add(TokenEvent(token, int(sampled), logprobs[index], reason))

    def _decode_on_device(
        self, B: int, span: int, forced_B: list[int], num_candidates: int
    ) -> list[list[float]]:
        """Next token, whether it is the last, and its log-probability, for each of B rows."""
        cache = self._cache.view(B, span)
        logits_BV = self.model.head(self.model.hidden(self._last[:B, None], cache)[:, -1])
        next_B = sample(logits_BV, self._rows, num_candidates)
        if max(forced_B) != NOT_FORCED:
            forcing = torch.tensor(forced_B, device=next_B.device)
            next_B = torch.where(forcing == NOT_FORCED, next_B, forcing)
        logprob_B = logits_BV.gather(1, next_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)
        self._rows.position[:B] += 1
        stopped_B = self._stops[:B].gather(1, next_B[:, None])[:, 0]
        finished_B = stopped_B | (self._rows.position[:B] >= self._limits[:B])
        self._last[:B] = next_B
        self._active[:B] &= ~finished_B
        cache.lengths *= self._active[:B]  # free slots write to position 0, again and again
        # one transfer: float32 holds the ids of any vocabulary below 2^24
        return torch.stack((next_B.float(), finished_B.float(), logprob_B)).tolist()

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """Events of one request as they come; it is cancelled when the reader stops early."""
        handle = self.submit(request)
        seen = 0
        try:
            while seen < len(handle.events) or not handle.done:
                if seen == len(handle.events):
                    self.step()
                    continue
                yield handle.events[seen]
                seen += 1
        finally:
            self.cancel(handle)

    def complete(self, requests: Sequence[Request]) -> list[Handle]:
        """Generate to the end of every request; handles in the order of the requests.

        Raises  RuntimeError if another thread's step failed meanwhile.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self.submit(request))
            while not all(handle.done for handle in handles):
                self.step()
        finally:
            for handle in handles:
                self.cancel(handle)
        check_whole(handles)
        return handles

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        top_p: float = 1.0,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Columns (tokens, masks) of `num_samples` answers; mask 1: sampled, 0: forced.

        A row that has ended repeats its stop token, with mask 0, until all have ended.
        """
        requests = samples_of(tokens, num_samples, max_tokens, temperature, top_k, seed, top_p)
        handles = [self.submit(request) for request in requests]  # all are refused, or none
        column = 0
        try:
            while True:
                while not all(handle.done or len(handle.events) > column for handle in handles):
                    self.step()
                check_whole(handles)
                going = [len(handle.events) > column for handle in handles]
                if not any(going):
                    return
                events = [handle.events[min(column, len(handle.events) - 1)] for handle in handles]
                ids = [event.token for event in events if event.token is not None]
                yield ids, [e.mask * goes for e, goes in zip(events, going, strict=True)]
                column += 1
        finally:
            for handle in handles:
                self.cancel(handle)

    def generate_batch(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        top_p: float = 1.0,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(sequences, masks) of `num_samples` answers, each after its prompt, whose mask is 0.

        Stop tokens are left out; masks as in `generate`.
        """
        handles = self.complete(
            samples_of(tokens, num_samples, max_tokens, temperature, top_k, seed, top_p)
        )
        sequences = [[*tokens, *handle.tokens] for handle in handles]
        return sequences, [[0] * len(tokens) + handle.masks for handle in handles]
