"""The chat over HTTP: one page, JSON, server-sent events, a WebSocket, and OpenAI's shape.

    GET  / and /ui.html        the page
    POST /chat                 {"message"} or {"messages"} -> {"response"}
    WS   /ws                   the same in, {"token", "type"} ... {"done": true} out
    POST /chat/completions     {"messages", ...} -> data: {"token", "type"} ... data: {"done": true}
    POST /v1/chat/completions  as OpenAI's, with and without "stream"
    GET  /health, /stats

The engine steps in a thread of its own; requests wait on queues, so that /health answers at once
whatever is being generated. A client that leaves cancels its request.
"""

import asyncio
import json
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field, ValidationError

from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request, TokenEvent
from nanochat.infer.sampling import SamplingSettings
from nanochat.serve.answer import AnswerReader
from nanochat.serve.prompt import fit_prompt

PAGE = Path(__file__).with_name("ui.html")
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_TOTAL_CHARS = 32_000


class Part(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    def num_chars(self) -> int:
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content)


class ChatRequest(BaseModel):
    """A conversation and how to answer it; None takes the server's default."""

    messages: list[Message] = Field(default=[], max_length=MAX_MESSAGES)
    message: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_k: int | None = Field(default=None, ge=1, le=200)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=4096)
    seed: int | None = None
    stream: bool = False
    model: str = "nanochat"


class Defaults(BaseModel):
    """What a request that says nothing gets."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512


class Worker(threading.Thread):
    """Steps the engine while there is something to do."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(daemon=True, name="engine")
        self.engine = engine
        self.stopping = threading.Event()
        self.error = ""

    def run(self) -> None:
        while not self.stopping.is_set():
            self.engine.wait(0.1)
            try:
                while self.engine.step():
                    pass
            except RuntimeError as error:  # such as memory that ran out: the requests end, not us
                self.error = str(error)


class Chat:
    """Turns requests into answers; counts them."""

    def __init__(self, engine: Engine, defaults: Defaults) -> None:
        self.engine = engine
        self.defaults = defaults
        self.num_requests = self.num_tokens = 0
        self.started = time.time()

    def prepare(self, body: ChatRequest) -> Request:
        """Raises HTTPException 400 naming the limit that a conversation breaks."""
        messages = [m.model_dump() for m in body.messages]
        chars = [m.num_chars() for m in body.messages]
        if body.message is not None:
            messages.append({"role": "user", "content": body.message})
            chars.append(len(body.message))
        for size, limit, what in (
            (max(chars, default=0), MAX_MESSAGE_CHARS, "characters in a message"),
            (sum(chars), MAX_TOTAL_CHARS, "characters in all"),
        ):
            if size > limit:
                raise HTTPException(400, f"{size:,} {what}; at most {limit:,}: shorten or restart")
        if not messages or any(not m["content"] for m in messages):
            raise HTTPException(400, "a conversation needs messages, and none of them empty")
        d = self.defaults
        wanted = body.max_tokens or d.max_tokens
        sampling = SamplingSettings(
            d.temperature if body.temperature is None else body.temperature,
            body.top_k or d.top_k,
            body.top_p or d.top_p,
            secrets.randbits(62) if body.seed is None else body.seed,
        )
        # half of the context at least is left for the conversation
        room = self.engine.capacity - min(wanted, self.engine.capacity // 2)
        try:
            fitted = fit_prompt(self.engine.tokenizer, messages, room)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return Request(fitted.tokens, wanted, sampling)

    async def pieces(self, request: Request) -> AsyncIterator[tuple[str, str]]:
        """Kind and text of the answer as they come.

        Raises  RuntimeError if the engine failed.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def put(event: TokenEvent) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        handle = self.engine.submit(request, put)
        self.num_requests += 1
        reader = AnswerReader(self.engine.tokenizer)
        try:
            while True:
                event = await events.get()
                if event.token is None:
                    raise RuntimeError(f"the generation ended early: {event.finish_reason}")
                self.num_tokens += 1
                if event.finish_reason != "stop":
                    kind, text = reader.add(event.token)
                    if text:
                        yield kind, text
                if event.finish_reason:
                    kind, text = reader.finish()
                    if text:
                        yield kind, text
                    return
        finally:
            self.engine.cancel(handle)

    async def whole(self, request: Request) -> str:
        """The text of the answer, without what the tool said."""
        return "".join([text async for kind, text in self.pieces(request) if kind == "text"])


def create_app(engine: Engine, defaults: Defaults | None = None) -> FastAPI:
    """The application around an engine."""
    chat = Chat(engine, defaults or Defaults())
    worker = Worker(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stopping.set()
        worker.join()

    app = FastAPI(title="nanochat", lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: object, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _explain(error.errors())}, status_code=400)

    @app.get("/", response_class=HTMLResponse)
    @app.get("/ui.html", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        ok = worker.is_alive() and not worker.error
        return {"status": "ok" if ok else "failing", "error": worker.error}

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return {
            "requests": chat.num_requests,
            "tokens": chat.num_tokens,
            "active": engine.num_active,
            "waiting": engine.num_waiting,
            "slots": engine.num_slots,
            "context": engine.capacity,
            "seconds": time.time() - chat.started,
        }

    @app.post("/chat")
    async def whole(body: ChatRequest) -> dict[str, str]:
        return {"response": await chat.whole(chat.prepare(body))}

    @app.post("/chat/completions")
    async def events(body: ChatRequest) -> StreamingResponse:
        return _stream(_page_events(chat, chat.prepare(body)))

    @app.post("/v1/chat/completions", response_model=None)
    async def openai(body: ChatRequest) -> StreamingResponse | dict[str, Any]:
        request = chat.prepare(body)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"model": body.model}
        if body.stream:
            return _stream(_openai_events(chat, request, head))
        message = {"role": "assistant", "content": await chat.whole(request)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return head | {"object": "chat.completion", "choices": [choice]}

    @app.websocket("/ws")
    async def websocket(socket: WebSocket) -> None:
        await socket.accept()
        try:
            while True:
                await _answer_socket(chat, socket, await socket.receive_text())
        except WebSocketDisconnect:
            return

    return app


def _explain(errors: Any) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors)


def _stream(lines: AsyncIterator[str]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


async def _page_events(chat: Chat, request: Request) -> AsyncIterator[str]:
    try:
        async for kind, text in chat.pieces(request):
            yield f"data: {json.dumps({'token': text, 'type': kind})}\n\n"
        yield f"data: {json.dumps({'done': True})}\n\n"
    except RuntimeError as error:
        yield f"data: {json.dumps({'error': str(error)})}\n\n"


async def _openai_events(chat: Chat, request: Request, head: dict[str, Any]) -> AsyncIterator[str]:
    head = head | {"object": "chat.completion.chunk"}

    def chunk(delta: dict[str, str], reason: str | None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

    yield chunk({"role": "assistant", "content": ""}, None)
    async for kind, text in chat.pieces(request):
        if kind == "text":
            yield chunk({"content": text}, None)
    yield chunk({}, "stop")
    yield "data: [DONE]\n\n"


async def _answer_socket(chat: Chat, socket: WebSocket, text: str) -> None:
    try:
        request = chat.prepare(ChatRequest.model_validate_json(text))
        async for kind, piece in chat.pieces(request):
            await socket.send_json({"token": piece, "type": kind})
        await socket.send_json({"done": True})
    except HTTPException as error:
        await socket.send_json({"error": error.detail})
    except ValidationError as error:
        await socket.send_json({"error": _explain(error.errors())})
    except RuntimeError as error:
        await socket.send_json({"error": str(error)})
