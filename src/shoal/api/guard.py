"""Who may come in: the Host header, the API key; and a name for each request."""

from __future__ import annotations

import hmac
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import Refused, ShoalError
from .config import ApiConfig
from .failures import HttpError, response_of

OPEN_PATHS = frozenset({"/", "/health"})  # need no key
REQUEST_ID = "shoal.request_id"  # in the ASGI scope


class Guard:
    """ASGI middleware: refuses foreign hosts and wrong keys, stamps `x-request-id` on answers."""

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        self._app = app
        self._hosts = frozenset(config.allowed_hosts)
        self._key = config.api_key.encode() if config.api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[REQUEST_ID] = name = secrets.token_hex(16)
        header = (b"x-request-id", name.encode())

        async def send_stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            self._check(scope)
        except ShoalError as error:
            await response_of(error)(scope, receive, send_stamped)
            return
        await self._app(scope, receive, send_stamped)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts and (host := _name_in(headers.get("host", ""))) not in self._hosts:
            raise Refused(
                f"this node does not answer under the name {host!r}",
                hint="use http://127.0.0.1, or listen on an outside address with --host",
            )
        if self._key and scope["path"] not in OPEN_PATHS:
            self._check_key(headers.get("authorization", ""))

    def _check_key(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if self._key is None or not hmac.compare_digest(given, self._key):
            raise HttpError(
                401,
                "invalid_api_key",
                "a valid API key is needed here" if given else "no API key was sent",
                hint="send the header `Authorization: Bearer KEY` with the key of this node",
            )


def _name_in(host: str) -> str:
    """The name in a Host header, without port: `[::1]:7470` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
