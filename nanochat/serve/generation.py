"""Requests of clients on their way through the engine.

Events come from the engine's thread; a queue brings them to the event loop. However a generation
ends (done, failed, too late, its client gone) its requests leave the engine with it.
"""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from nanochat.infer.engine import Engine
from nanochat.infer.requests import Handle, Request, ScoredToken, TokenEvent
from nanochat.infer.sampling import SamplingSettings
from nanochat.serve.answer import AnswerPieces, Piece
from nanochat.serve.config import ServerConfig
from nanochat.serve.engine_thread import EngineThread
from nanochat.serve.errors import ApiError
from nanochat.serve.metrics import Metrics

USUAL_SECONDS = 1.0  # of an answer, until one has been measured
SMALLEST_TOP_P = 1e-9  # what 0 means: the likeliest token alone


class Generations:
    """Admits requests while there is room, and counts what becomes of them."""

    def __init__(self, engine: Engine, thread: EngineThread, config: ServerConfig) -> None:
        self.engine, self.thread, self.config = engine, thread, config
        self.metrics = Metrics()
        self.token_bytes = engine.tokenizer.token_bytes()
        self.num_requests = self.num_tokens = 0
        self.started = time.time()
        self._usual_seconds = USUAL_SECONDS

    def sampling(
        self,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        sample: int = 0,
    ) -> SamplingSettings:
        """What was asked for, and the server's defaults for the rest."""
        config = self.config
        top_p = config.top_p if top_p is None else max(top_p, SMALLEST_TOP_P)
        return SamplingSettings(
            config.temperature if temperature is None else temperature,
            config.top_k if top_k is None else top_k,
            top_p,
            secrets.randbits(62) if seed is None else seed,
            sample,
        )

    def submit(
        self, requests: Sequence[Request], stops: Sequence[str] = (), raw: bool = False
    ) -> "Generation":
        """Queue requests that belong together: all, or none.

        raw     as in AnswerPieces.
        Raises  ApiError 429 if too many wait already; 400 for a request the model cannot answer.
        """
        for request in requests:
            try:
                request.check(self.engine.capacity, self.engine.vocab_size)
            except ValueError as error:
                raise ApiError(400, str(error), "invalid_value") from error
        free = self.engine.num_slots - self.engine.num_active
        room = self.config.max_queue + free - self.engine.num_waiting
        if len(requests) > self.config.max_queue + self.engine.num_slots:
            limit = self.config.max_queue + self.engine.num_slots
            message = f"{len(requests)} answers in one request; at most {limit}"
            raise ApiError(400, message, "invalid_value", "n")
        if len(requests) > room:
            rounds = (self.engine.num_waiting + self.engine.num_active) / self.engine.num_slots
            seconds = str(max(1, math.ceil(rounds * self._usual_seconds)))
            waiting = self.engine.num_waiting
            message = f"{waiting} requests wait already; try again in {seconds} seconds"
            raise ApiError(429, message, "queue_full", headers={"Retry-After": seconds})
        self.num_requests += 1
        return Generation(self, requests, stops, raw)

    def note(self, handle: Handle, finish_reason: str, seconds: float) -> None:
        """Count an answer that has ended."""
        tokens = sum(event.token is not None for event in handle.events)
        self.num_tokens += tokens
        self.metrics.tokens.labels("prompt").inc(len(handle.request.tokens))
        self.metrics.tokens.labels("generated").inc(tokens)
        self.metrics.answers.labels(finish_reason).inc()
        self.metrics.seconds.observe(seconds)
        self.refresh()
        if finish_reason in ("stop", "length"):
            self._usual_seconds += 0.1 * (seconds - self._usual_seconds)

    def refresh(self) -> None:
        """Tell the metrics how things are."""
        self.metrics.set(
            active=self.engine.num_active,
            waiting=self.engine.num_waiting,
            slots=self.engine.num_slots,
            healthy=float(not self.thread.error),
            failures=self.thread.num_failures,
        )


class Generation:
    """Answers being written: to one prompt or several. Read `pieces` once; `close` at the end."""

    def __init__(
        self, owner: Generations, requests: Sequence[Request], stops: Sequence[str], raw: bool
    ) -> None:
        self._owner = owner
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        # as long as the answers at most: the engine does not wait for whoever reads
        self._events: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        tokenizer = owner.engine.tokenizer
        self._answers = [AnswerPieces(tokenizer, owner.token_bytes, stops, raw) for _ in requests]
        self._open = set(range(len(requests)))
        self._submitted = [
            owner.engine.submit(request, self._listener(index))
            for index, request in enumerate(requests)
        ]

    def _listener(self, index: int) -> Any:
        def hear(event: TokenEvent) -> None:
            self._owner.thread.observe(event)
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return hear

    def __len__(self) -> int:
        return len(self._submitted)

    def prompt(self, index: int) -> list[ScoredToken]:
        """Scores of a request's prompt, once its first piece has come."""
        return self._submitted[index].prompt

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far, those that ended an answer among them."""
        handles = self._submitted
        return sum(event.token is not None for handle in handles for event in handle.events)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Index of the request and some more of its answer, as they come.

        The last piece of each answer says why it ended.
        Raises  ApiError 503 if the engine failed, 504 if it took too long.
        """
        first = True
        while self._open:
            index, event = await self._next()
            if index not in self._open:  # ended by a stop string; cancelled since
                continue
            if event.finish_reason in ("error", "cancelled"):
                self._end(index, event.finish_reason)
                why = event.error or event.finish_reason
                raise ApiError(503, f"the generation failed: {why}", "generation_failed")
            if first:
                first = False
                self._owner.metrics.first_token.observe(time.monotonic() - self._began)
            for piece in self._pieces_of(index, event):
                if piece.finish_reason:
                    self._end(index, piece.finish_reason)
                yield index, piece

    def close(self) -> None:
        """Cancel what has not ended."""
        for index in tuple(self._open):
            self._end(index, "cancelled")

    def _pieces_of(self, index: int, event: TokenEvent) -> list[Piece]:
        if event.token is None:  # the prompt was to be scored, and no more
            return [Piece("text", "", (), event.finish_reason)]
        scored = ScoredToken(event.token, event.logprob, event.top)
        return self._answers[index].add(scored, event.finish_reason)

    async def _next(self) -> tuple[int, TokenEvent]:
        limit = self._owner.config.request_timeout
        left = self._began + limit - time.monotonic()
        try:
            return await asyncio.wait_for(self._events.get(), max(0.0, left))
        except asyncio.TimeoutError as error:
            message = f"the answer took more than {limit:g} seconds"
            raise ApiError(504, message, "timeout") from error

    def _end(self, index: int, finish_reason: str) -> None:
        self._open.discard(index)
        handle = self._submitted[index]
        self._owner.engine.cancel(handle)
        self._owner.note(handle, finish_reason, time.monotonic() - self._began)
