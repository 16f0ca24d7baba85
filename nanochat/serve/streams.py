"""Answers on their way to clients, who may leave at any time, or take nothing any more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = 15.0  # seconds of silence before a comment shows proxies that the stream lives
T = TypeVar("T")


class ClientLeftError(Exception):
    """There is nobody to answer any more."""


async def _left(receive: Receive) -> None:
    """Return when the client has left: its request has been read, so nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _race(work: "asyncio.Future[T]", leaving: "asyncio.Future[Any]") -> T:
    """The result of `work`, or ClientLeftError if `leaving` is done first; ends both."""
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeftError
        return work.result()
    finally:
        for task in (work, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def unless_left(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, which is cancelled as soon as the client leaves.

    Raises  ClientLeftError
    """
    leaving = asyncio.ensure_future(_left(request.receive))
    return await _race(asyncio.ensure_future(work), leaving)


class EventStream(Response):
    """Server-sent events, until they end or the client leaves or stops reading.

    close         called at the end, whatever it was.
    send_timeout  seconds in which the client must take what was sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[str], close: Callable[[], None], send_timeout: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._send_timeout = events, close, send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        # a client that has left, or stopped reading, gets no more: that is no error of ours
        with contextlib.suppress(ClientLeftError, asyncio.TimeoutError, OSError):
            try:
                await _race(sending, asyncio.ensure_future(_left(receive)))
            finally:
                self._close()

    async def _send_all(self, send: Send) -> None:
        async def put(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self._send_timeout)

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await put(start)
        async for text in with_keep_alive(self._events):
            await put({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await put({"type": "http.response.body", "body": b"", "more_body": False})


async def with_keep_alive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events, and comments where they are silent for long."""
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE)
            if not done:
                yield ": waiting\n\n"
                continue
            try:
                text = coming.result()
            except StopAsyncIteration:
                return
            coming = asyncio.ensure_future(anext(events))
            yield text
    finally:
        coming.cancel()
