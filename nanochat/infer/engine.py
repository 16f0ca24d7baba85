"""Generation: requests share the slots of one key/value cache and are decoded together.

    submit -> waits for a slot -> prefill: the prompt but its last token -> one token a step

Two slots and three requests A, B, C with answers of 2, 4 and 2 tokens:

    step   slot 0            slot 1            waiting
    1      prefill A, a1     prefill B, b1     C
    2      a2 (ends)         b2                C
    3      prefill C, c1     b3
    4      c2 (ends)         b4 (ends)

A step evicts what was cancelled, admits what waits, feeds every slot its last token and draws the
next (slots.py). On the host the calculator answers: its tokens are forced upon the row, one per
step. A request's tokens depend on its prompt and settings, not on its slot or its company, up to
the rounding of matrix products, which differs between batch sizes.

A failure ends few requests: a tool call its own, a prefill the prompts in it, a decoding step all
that have a slot. The next step begins clean, with those that wait.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nanochat.gpt import GPT
from nanochat.infer.requests import Handle, Request, TokenEvent, ToolCalls, check_whole, samples_of
from nanochat.infer.slots import NOT_FORCED, Slots
from nanochat.infer.weights import cast_weights
from nanochat.text.tokenizer_base import Tokenizer

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

        self._device = Slots(self.model, num_slots)
        self._slots: list[_Slot | None] = [None] * num_slots
        self._waiting: deque[Handle] = deque()
        self._any_cancelled = False
        self._failed = False
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

        Whatever is raised has ended the requests it concerns; the next step answers the others.
        """
        with self._step_lock:
            self._work.clear()
            if self._failed:
                self._recover()
            if self._any_cancelled:
                self._any_cancelled = False
                self._end(lambda handle: handle.cancelled, "cancelled")
            admitted = self._admit()  # before decoding: a new request gets its first token now
            if self.num_active:
                self._decode()
                return True
            return admitted

    def _recover(self) -> None:
        """After a failure no slot is used: forget what they held."""
        try:
            self._device.clean([i for i, slot in enumerate(self._slots) if slot is None])
        except BaseException as error:  # a device that is lost answers nobody
            self._fail(lambda handle: True, error)
            raise
        self._failed = False

    def _fail(self, chosen: Callable[[Handle], bool], error: BaseException) -> None:
        self._failed = True
        self._end(chosen, "error", f"{type(error).__name__}: {error}", release=False)

    def _end(
        self, chosen: Callable[[Handle], bool], reason: str, error: str = "", release: bool = True
    ) -> None:
        """End the chosen requests, whether they have a slot or wait."""
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
            handle.add(TokenEvent(None, 0, 0.0, reason, error))
        if freed and release:
            self._device.release(freed)

    def _admit(self) -> bool:
        """Fill free slots from the queue; a prompt is prefilled once for all its slots."""
        fresh: dict[tuple[int, ...], list[int]] = {}
        admitted: list[Handle] = []
        try:
            while None in self._slots:
                with self._queue_lock:
                    if not self._waiting:
                        break
                    prefix = tuple(self._waiting[0].request.tokens[:-1])
                    longest = max(map(len, (*fresh, prefix)))
                    if fresh and (len(fresh) + 1) * longest > self.prefill_tokens:
                        break
                    handle = self._waiting.popleft()
                # the same prompt in the cache already, or about to be prefilled for another slot?
                # (scores need the final states, which no cache keeps)
                holders = [i for i, s in enumerate(self._slots) if s and s.prefix == prefix]
                slot = self._slots.index(None)
                admitted.append(handle)
                self._occupy(slot, handle, prefix)
                if not holders or prefix in fresh or handle.request.prompt_logprobs is not None:
                    fresh.setdefault(prefix, []).append(slot)
                else:
                    self._device.copy(holders[0], slot, len(prefix))
            if fresh:
                self._prefill(fresh)
        except BaseException as error:  # an interrupt, too, leaves slots half filled
            self._fail(admitted.__contains__, error)
            raise
        return bool(admitted)

    def _occupy(self, index: int, handle: Handle, prefix: tuple[int, ...]) -> None:
        tools = ToolCalls(self.tokenizer) if handle.request.calculator else None
        self._slots[index] = _Slot(handle, prefix, len(prefix), tools)
        self._device.occupy(index, handle.request, self._stops_of(handle.request))

    def _stops_of(self, request: Request) -> Sequence[int]:
        return self.stop_tokens if request.stop_tokens is None else request.stop_tokens

    def _prefill(self, fresh: dict[tuple[int, ...], list[int]]) -> None:
        """Prefill new prompts; score those that ask for it, and end those that want no more."""
        states = self._device.prefill(fresh)
        for row, indices in enumerate(fresh.values()):
            for index in indices:
                slot = self._slots[index]
                assert slot is not None
                request = slot.handle.request
                if request.prompt_logprobs is not None:
                    slot.handle.prompt = self._device.score(
                        states[row, : len(slot.prefix)], request.tokens[1:], request.prompt_logprobs
                    )
                if not all(scored.is_sound for scored in slot.handle.prompt):
                    self._end_broken(index, slot.handle)
                elif request.max_tokens == 0:
                    self._end([slot.handle].__contains__, "length")

    def _end_broken(self, index: int, handle: Handle) -> None:
        error = "the model's logits are not numbers: its weights are broken"
        self._end([handle].__contains__, "error", error)
        self._device.clean([index])

    def _decode(self) -> None:
        used = {index: slot for index, slot in enumerate(self._slots) if slot is not None}
        try:
            B = max(used) + 1
            longest = max(slot.length for slot in used.values()) + 1
            forced = {i: slot.tools.forced for i, slot in used.items() if slot.tools}
            forced_B = [forced[i].popleft() if forced.get(i) else NOT_FORCED for i in range(B)]
            requests = [slot.handle.request for slot in used.values()]
            candidates = max(r.sampling.num_candidates(self.vocab_size) for r in requests)
            num_top = max(r.top_logprobs for r in requests)
            drawn = self._device.decode(B, longest, forced_B, candidates, num_top)
        except BaseException as error:
            self._fail([slot.handle for slot in used.values()].__contains__, error)
            raise
        # on the host: tool calls, events, and free the slots of what has ended
        for index, slot in used.items():
            slot.length += 1
            handle, scored = slot.handle, drawn[index].token
            if not scored.is_sound:
                self._end_broken(index, handle)
                continue
            try:
                if slot.tools:
                    slot.tools.see(scored.token)
            except Exception as error:  # of one call: the other requests continue
                self._end([handle].__contains__, "error", f"{type(error).__name__}: {error}")
                continue
            reason = ""
            if drawn[index].finished:
                self._slots[index] = None
                stopped = scored.token in self._stops_of(handle.request)
                reason = "stop" if stopped else "length"
            sampled = forced_B[index] == NOT_FORCED
            top = scored.top[: handle.request.top_logprobs]
            handle.add(TokenEvent(scored.token, int(sampled), scored.logprob, reason, top=top))
            self._any_cancelled |= handle.cancelled  # its listener failed

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
            handles += map(self.submit, requests)
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
