"""A chat model over HTTP: the page, its routes, OpenAI's API, health and numbers.

The engine steps in a thread of its own; requests wait on queues, so that /health answers at once
whatever is being generated. A client that leaves cancels its request.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.infer.engine import Engine
from nanochat.serve.chat_api import ChatApi
from nanochat.serve.config import ServerConfig
from nanochat.serve.engine_thread import EngineThread
from nanochat.serve.errors import ApiError, error_response, invalid
from nanochat.serve.generation import Generations
from nanochat.serve.guard import Guard
from nanochat.serve.openai_api import OpenAIApi
from nanochat.serve.streams import ClientLeftError

CLIENT_LEFT = 499  # nginx's status for a client that did not wait; nobody gets to see it


def create_app(engine: Engine, config: ServerConfig | None = None) -> FastAPI:
    """The application around an engine."""
    config = config or ServerConfig()
    thread = EngineThread(engine, config.stall_timeout, config.give_up_after)
    generations = Generations(engine, thread, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        thread.start()
        generations.refresh()
        yield
        thread.stop()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return error_response(request.url.path, invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def explain(request: HttpRequest, error: HTTPException) -> JSONResponse:
        return error_response(request.url.path, error)

    @app.exception_handler(ClientLeftError)
    async def forget(request: HttpRequest, error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(Exception)
    async def apologize(request: HttpRequest, error: Exception) -> JSONResponse:
        # what went wrong is logged; its words are no business of clients
        return error_response(request.url.path, ApiError(500, "an error of the server"))

    @app.get("/health")
    async def health() -> JSONResponse:
        error = thread.error
        body = {"status": "failing" if error else "ok", "error": error}
        return JSONResponse(body, 503 if error else 200)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return {
            "requests": generations.num_requests,
            "tokens": generations.num_tokens,
            "active": engine.num_active,
            "waiting": engine.num_waiting,
            "slots": engine.num_slots,
            "context": engine.capacity,
            "seconds": time.time() - generations.started,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        generations.refresh()
        return Response(generations.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.include_router(ChatApi(generations).router())
    app.include_router(OpenAIApi(generations).router())
    app.add_middleware(Guard, config=config, requests=generations.metrics.requests)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app
