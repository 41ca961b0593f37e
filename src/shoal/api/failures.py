"""An error as a client sees it: a status, and OpenAI's error object with all four keys."""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from ..errors import InvalidRequest, LocalError, Overloaded, ShoalError

RETRY_AFTER_S = 2  # for 503: a route may appear as soon as a node announces itself
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class HttpError(LocalError):
    """A request that HTTP itself lets us refuse, such as a body that is too large."""

    def __init__(self, status: int, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.http_status = status
        self.code = code


class ShuttingDown(LocalError):
    """The node stops; an open stream ends with this instead of a bare end."""

    http_status = 503
    code = "shutting_down"


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


def body_of(error: ShoalError) -> bytes:
    """`{"error": {...}}`, as JSON."""
    detail = ErrorDetail(
        message=f"{error.message}; try: {error.hint}" if error.hint else error.message,
        type=_type_of(error.http_status),
        param=error.param if isinstance(error, InvalidRequest) else None,
        code=error.code,
    )
    return msgspec.json.encode(ErrorBody(detail))


def response_of(error: ShoalError) -> Response:
    response = Response(body_of(error), error.http_status, media_type="application/json")
    if isinstance(error, Overloaded):
        response.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    elif error.http_status == 503:
        response.headers["retry-after"] = str(RETRY_AFTER_S)
    elif error.http_status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def _type_of(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
