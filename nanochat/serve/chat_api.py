"""The page and the routes it was made with: plain JSON, server-sent events, a WebSocket.

    GET  / and /ui.html        the page
    POST /chat                 {"message"} or {"messages"} -> {"response"}
    POST /chat/completions     the same in, data: {"token", "type"} ... data: {"done": true}
    WS   /ws                   the same in, {"token", "type"} ... {"done": true} out

A conversation that has become too long for the context loses its oldest turns.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, WebSocket
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse
from pydantic import ValidationError

from nanochat.infer.requests import Request
from nanochat.serve.errors import REFUSALS, ApiError, invalid
from nanochat.serve.generation import Generation, Generations
from nanochat.serve.openai_api import prompt_of
from nanochat.serve.openai_shapes import event
from nanochat.serve.schema import ChatRequest, PlainMessage
from nanochat.serve.streams import EventStream, unless_left

PAGE = Path(__file__).with_name("ui.html")
# the page loads and calls nothing but this server, and no other page frames it
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
UNREAD_MESSAGES = 8  # of a WebSocket, while one is answered
UNSUPPORTED_DATA, TRY_AGAIN_LATER = 1003, 1013  # close codes of RFC 6455 and its registry


class ChatApi:
    """The routes around one engine."""

    def __init__(self, generations: Generations) -> None:
        self.generations = generations
        self.config = generations.config

    def router(self) -> APIRouter:
        """All routes."""
        router = APIRouter(responses=REFUSALS)
        router.get("/", response_class=HTMLResponse)(self.page)
        router.get("/ui.html", response_class=HTMLResponse)(self.page)
        router.post("/chat")(self.whole)
        router.post("/chat/completions")(self.events)
        router.websocket("/ws")(self.websocket)
        return router

    async def page(self) -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def whole(self, body: ChatRequest, http: HttpRequest) -> dict[str, str]:
        """The text of the answer, without what the tool said."""
        generation = self._submit(body)
        try:
            return {"response": await unless_left(http, _text(generation))}
        finally:
            generation.close()

    async def events(self, body: ChatRequest) -> EventStream:
        generation = self._submit(body)
        return EventStream(_events(generation), generation.close, self.config.send_timeout)

    async def websocket(self, socket: WebSocket) -> None:
        """Answer messages one after the other; a client that leaves ends its answer."""
        await socket.accept()
        inbox: asyncio.Queue[str] = asyncio.Queue(UNREAD_MESSAGES)
        reading = asyncio.ensure_future(self._read(socket, inbox))
        answering = asyncio.ensure_future(self._answer_all(socket, inbox))
        try:
            await asyncio.wait({reading, answering}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, answering):
                task.cancel()
                # that a client has left is no error; asyncio wants it to be looked at
                task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _read(self, socket: WebSocket, inbox: "asyncio.Queue[str]") -> None:
        while (message := await socket.receive())["type"] == "websocket.receive":
            text = message.get("text")
            if text is None:
                await socket.close(UNSUPPORTED_DATA, "send text frames, each a JSON object")
                return
            if inbox.full():
                await socket.close(TRY_AGAIN_LATER, "too many messages before their answers")
                return
            inbox.put_nowait(text)

    async def _answer_all(self, socket: WebSocket, inbox: "asyncio.Queue[str]") -> None:
        while True:
            async for message in self._answer(await inbox.get()):
                await asyncio.wait_for(socket.send_json(message), self.config.send_timeout)

    async def _answer(self, text: str) -> AsyncIterator[dict[str, Any]]:
        try:
            generation = self._submit(ChatRequest.model_validate_json(text))
        except ValidationError as error:
            yield {"error": invalid(error.errors()).detail}
            return
        except ApiError as error:
            seconds = (error.headers or {}).get("Retry-After")
            yield {"error": error.detail} | ({"retry_after": int(seconds)} if seconds else {})
            return
        try:
            async for message in _messages(generation):
                yield message
        finally:
            generation.close()

    def _submit(self, body: ChatRequest) -> Generation:
        """Raises ApiError for what cannot be answered, or not now."""
        messages = list(body.messages)
        if body.message is not None:
            messages.append(PlainMessage(role="user", content=body.message))
        capacity = self.generations.engine.capacity
        wanted = body.max_tokens or self.config.max_tokens
        # half of the context at least is left for the conversation
        tokens = prompt_of(self.generations, messages, capacity - min(wanted, capacity // 2))
        sampling = self.generations.sampling(body.temperature, body.top_k, body.top_p, body.seed)
        return self.generations.submit([Request(tokens, wanted, sampling)])


async def _text(generation: Generation) -> str:
    return "".join([piece.text async for _, piece in generation.pieces() if piece.kind == "text"])


async def _messages(generation: Generation) -> AsyncIterator[dict[str, Any]]:
    try:
        async for _, piece in generation.pieces():
            if piece.text:
                yield {"token": piece.text, "type": piece.kind}
        yield {"done": True}
    except ApiError as error:
        yield {"error": error.detail}


async def _events(generation: Generation) -> AsyncIterator[str]:
    async for message in _messages(generation):
        yield event(message)
