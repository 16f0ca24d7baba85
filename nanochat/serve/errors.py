"""Errors as clients get them.

Under /v1 and beside it they have OpenAI's shape, {"error": {"message", "type", "param", "code"}};
/chat, /chat/completions and /ws say {"detail"} and {"error"}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import fastapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

PLAIN_ROUTES = ("/chat", "/chat/completions")
# for the description of the API
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "the request is refused: the message says why"},
    "5XX": {"description": "the answer failed, or took too long"},
}


class ApiError(fastapi.HTTPException):
    """A request that is refused, or an answer that failed.

    code   for programs, such as "context_length_exceeded"
    param  the parameter at fault, as messages[0].content
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return error_body(self.status_code, self.detail, self.code, self.param)


def error_body(status: int, message: str, code: str | None, param: str | None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    # what a client has sent, and may be quoted here, need not be Unicode: "\ud800" in JSON
    message = message.encode(errors="replace").decode()
    param = param and param.encode(errors="replace").decode()
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(path: str, error: HTTPException) -> JSONResponse:
    """The answer to a request of `path` that was refused."""
    status, message = error.status_code, str(error.detail)
    code, param = (error.code, error.param) if isinstance(error, ApiError) else (None, None)
    if path in PLAIN_ROUTES:
        body: dict[str, Any] = {"detail": message}
    else:
        body = error_body(status, message, code, param)
    return JSONResponse(body, status, dict(error.headers or {}))


def invalid(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's errors, in words, with the parameter it is about."""
    first = errors[0]
    # tags of unions (schema.py) and "body" are no part of the parameter's name
    steps = [x for x in first["loc"] if x != "body" and not str(x).startswith("#")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    param = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in steps).lstrip(".") or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {param!r}", "unknown_parameter", param)
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    code = "unsupported_parameter" if first["type"] == "unsupported" else "invalid_value"
    return ApiError(400, message, code, param)
