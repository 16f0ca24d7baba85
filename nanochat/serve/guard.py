"""Who may come in, before a request reaches any route.

Host     an address, a name of this machine, or one that was allowed: a page of another site cannot
         reach this server by a name that it lets point here (DNS rebinding).
Origin   that of this server's own page, or one that was allowed: browsers send it with what a page
         of another site posts, and with every WebSocket.
key      a bearer token, where one is asked for; but not for the page and /health.
body     no longer than allowed, and there in time.
"""

import asyncio
import ipaddress
import secrets
import socket
import time
from urllib.parse import parse_qs, urlsplit

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve.config import ServerConfig
from nanochat.serve.errors import ApiError, error_response

WITHOUT_KEY = ("/", "/ui.html", "/health")
REFUSED = 1008  # close code "policy violation"; before a WebSocket is accepted, status 403


class Guard:
    """ASGI middleware.

    requests  counts answers by route and status.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, requests: Counter) -> None:
        self.app, self.config, self.requests = app, config, requests
        self._names = {
            "localhost",
            socket.gethostname().lower(),
            *map(str.lower, config.allowed_hosts),
        }
        self._origins = {origin.lower().rstrip("/") for origin in config.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send = self._counting(scope, send)
        try:
            self._check_host(headers)
            self._check_origin(headers)
            self._check_key(scope, headers)
            receive = self._bounded(scope, headers, receive)
        except ApiError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": REFUSED, "reason": error.detail})
            else:
                await error_response(scope["path"], error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _counting(self, scope: Scope, send: Send) -> Send:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # a path that nobody serves would be one more time series for whoever asks for it
                route = getattr(scope.get("route"), "path", "other")
                self.requests.labels(route, message["status"]).inc()
            await send(message)

        return counting

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if "*" in self._names or name in self._names or _is_address(name):
            return
        message = f"host {host!r} is not served here; start with --allowed_hosts={name} if it is"
        raise ApiError(403, message, "host_not_allowed")

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        own = origin.lower().partition("://")[2] == headers.get("host", "").lower()
        if not own and origin.lower() not in self._origins:
            message = f"pages of {origin} may not call this server; see --allowed_origins"
            raise ApiError(403, message, "origin_not_allowed")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        key = self.config.api_key
        if not key or (scope["type"] == "http" and scope["path"] in WITHOUT_KEY):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        presented = given.strip().encode("latin-1")  # as it came, whatever it means
        if scope["type"] == "websocket" and not given:  # a browser cannot send the header there
            query = parse_qs(scope["query_string"].decode("latin-1"))
            scheme, presented = "bearer", query.get("api_key", [""])[0].encode()
        right = secrets.compare_digest(presented, key.encode())
        if scheme.lower() != "bearer" or not right:
            message = "give the server's key: Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _bounded(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """`receive`, which raises ApiError 413 or 408 for a body too large or too slow."""
        if scope["type"] == "websocket":
            return receive
        limit = self.config.max_body_bytes
        too_large = ApiError(413, f"a body of more than {limit:,} bytes", "body_too_large")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        ends = time.monotonic() + self.config.read_timeout
        received = 0
        whole = False

        async def bounded() -> Message:
            nonlocal received, whole
            if whole:  # what may come now is that the client leaves, at any time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, ends - time.monotonic()))
            except asyncio.TimeoutError as error:
                raise ApiError(408, "the body did not come in time", "timeout") from error
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > limit:
                raise too_large
            return message

        return bounded


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
