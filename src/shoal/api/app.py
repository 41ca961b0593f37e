"""Which path does what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..errors import ShoalError
from .answer import Answerer
from .backend import Backend, ServedModel
from .config import ApiConfig
from .failures import HttpError, response_of
from .guard import REQUEST_ID, Guard
from .openai import Endpoint, understand_chat, understand_completion
from .presence import Presence
from .turnstile import Turnstile

_WELCOME = "shoal is running. The API is under /v1, its state under /health and /metrics.\n"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(backend: Backend, config: ApiConfig, metrics: Callable[[], bytes]) -> Starlette:
    """The whole front door as one ASGI application; `metrics` renders Prometheus' text format."""
    presence = Presence()
    answerer = Answerer(backend, presence, config.heartbeat_s)
    turnstile = Turnstile(config.per_turn)
    look = _Look(backend, metrics)
    app = Starlette(
        routes=[
            Route(
                "/v1/chat/completions",
                Endpoint(understand_chat, backend, answerer, turnstile, config),
                methods=["POST"],
            ),
            Route(
                "/v1/completions",
                Endpoint(understand_completion, backend, answerer, turnstile, config),
                methods=["POST"],
            ),
            Route("/", look.welcome),
            Route("/health", look.health),
            Route("/metrics", look.metrics),
            Route("/v1/models", look.models),
            Route("/v1/models/{name:path}", look.model),
            Route("/v1/node", look.node),
            Route("/v1/mesh", look.mesh),
        ],
        middleware=[Middleware(Guard, config)],
        exception_handlers={
            ShoalError: _on_shoal_error,
            HTTPException: _on_http_error,
            Exception: _on_bug,
        },
    )
    app.state.presence = presence
    return app


class _Look:
    """The endpoints that only show something."""

    def __init__(self, backend: Backend, metrics: Callable[[], bytes]) -> None:
        self._backend = backend
        self._metrics = metrics

    async def welcome(self, request: Request) -> Response:
        return PlainTextResponse(_WELCOME)

    async def health(self, request: Request) -> Response:
        if self._backend.loading:
            return _json({"status": "loading"}, 503)
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics(), headers={"content-type": _METRICS_TYPE})

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [_listed(m) for m in self._backend.models()]})

    async def model(self, request: Request) -> Response:
        return _json(_listed(self._backend.find(request.path_params["name"])))

    async def node(self, request: Request) -> Response:
        return _json(self._backend.status(ticket="ticket" in request.query_params))

    async def mesh(self, request: Request) -> Response:
        return _json(self._backend.mesh())


def _listed(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "shoal",
        "context_length": model.context_length,
        "ready": model.ready,
    }


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def _on_shoal_error(request: Request, error: Exception) -> Response:
    return response_of(error if isinstance(error, ShoalError) else ShoalError("internal error"))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, wrong method."""
    if not isinstance(error, HTTPException):
        return await _on_shoal_error(request, error)
    code = "not_found" if error.status_code == 404 else "bad_request"
    what = f"{request.method} {request.url.path}: {error.detail}"
    response = response_of(HttpError(error.status_code, code, what))
    response.headers.update(error.headers or {})
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    """Our own mistake: the server logs it under the id that the client is told."""
    response = await _on_shoal_error(request, ShoalError("internal error"))
    response.headers["x-request-id"] = request.scope.get(REQUEST_ID, "")
    return response
