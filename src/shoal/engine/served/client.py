"""The socket to the engine: questions, answers that stream, and how it is told from a dead one.

Only http and https; no redirect is followed, no proxy asked; the address and the key are in no
message. Whatever goes wrong is BackendFailed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import msgspec

from ...errors import BackendFailed, BadConfig
from ..request import Sampled
from .answer import Answer, EventLines
from .dialect import Dialect, Job

MAX_ANSWER_BYTES = 8 << 20  # of one that does not stream
CONNECT_S = 5.0
ANSWER_S = 20.0  # for short questions: one token at most
SILENCE_S = 110.0  # between two pieces of a stream; gateways give up after 120


@dataclass(frozen=True, slots=True)
class BackendAddress:
    """Where the engine listens. Shown nowhere."""

    url: str = field(repr=False)
    key: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str, key: str = "") -> BackendAddress:
        """`http://127.0.0.1:8000`, with or without the `/v1`. Raises BadConfig."""
        try:
            parts = urlsplit(url.strip())
            parts.port  # noqa: B018 - raises ValueError when it is none
            httpx.URL(url.strip())
        except (ValueError, httpx.InvalidURL):
            raise BadConfig("--backend is no URL", hint=EXAMPLE) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadConfig("--backend takes an http or https URL", hint=EXAMPLE)
        if parts.username is not None or parts.query or parts.fragment:
            raise BadConfig(
                "--backend takes a URL without a password, a query or a fragment",
                hint="give a key with --backend-key-file FILE or SHOAL_BACKEND_KEY",
            )
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(f"{parts.scheme}://{parts.netloc}{path}/", key)


EXAMPLE = "such as --backend http://127.0.0.1:8000"


class EngineClient:
    """`async with` it. `transport` is for tests."""

    def __init__(
        self,
        address: BackendAddress,
        *,
        silence_s: float = SILENCE_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=address.url,
            headers={"authorization": f"Bearer {address.key}"} if address.key else {},
            timeout=httpx.Timeout(silence_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET, or POST when there is a body; the answer's JSON object. Raises BackendFailed, with
        `status` when the engine did answer.
        """
        async with self._request(path, body, timeout=ANSWER_S) as response:
            data = await _bounded(response)
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except (ValueError, RecursionError):
            raise BackendFailed("the engine's answer is no JSON object") from None

    async def generate(
        self, dialect: Dialect, job: Job, end_id: int
    ) -> AsyncGenerator[list[Sampled], None]:
        """Tokens as they come, the last with a `finish`. Close it to free the engine's slot."""
        answer, lines = Answer(job, dialect.reader(), end_id), EventLines()
        async with self._request(dialect.path, dialect.body(job)) as response:
            async for data in response.aiter_bytes():
                for event in lines.receive(data):
                    if tokens := answer.take(event):
                        yield tokens
                    if answer.over:
                        return
        raise BackendFailed("the engine's answer broke off")

    @asynccontextmanager
    async def _request(
        self, path: str, body: dict[str, Any] | None, timeout: float | None = None
    ) -> AsyncIterator[httpx.Response]:
        asked: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        method = "GET" if body is None else "POST"
        if body is not None:
            asked["content"] = msgspec.json.encode(body)
            asked["headers"] = {"content-type": "application/json"}
        try:
            async with self._http.stream(method, path, **asked) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refused(response.status_code, await _bounded(response))
                yield response
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise BackendFailed(f"the engine does not answer ({type(error).__name__})") from None


async def _bounded(response: httpx.Response) -> bytes:
    data = b""
    async for part in response.aiter_bytes():
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            raise BackendFailed(f"the engine's answer has more than {MAX_ANSWER_BYTES} bytes")
    return data


def _refused(status: int, data: bytes) -> BackendFailed:
    if httpx.codes.is_redirect(status):
        return BackendFailed("the engine redirects, and no redirect is followed", status=status)
    told = ""
    try:
        error = msgspec.json.decode(data, type=dict[str, Any]).get("error")
        told = str(error.get("message") if isinstance(error, dict) else error or "")[:200]
    except (ValueError, RecursionError):
        pass
    return BackendFailed(f"the engine answers {status}{': ' if told else ''}{told}", status=status)
