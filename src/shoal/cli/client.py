"""Asks the node of this machine over its HTTP API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from ..errors import InvalidRequest, LocalError, NotRunning, Refused, ShoalError
from .reports import MeshReport, NodeReport

if TYPE_CHECKING:
    import httpx

DEFAULT_API = "http://127.0.0.1:7470"
ASK_TIMEOUT_S = 10.0
Report = TypeVar("Report")


class NodeClient:
    """The HTTP API of one running node. Every call raises NotRunning when nobody answers there."""

    def __init__(self, api: str, api_key: str = "") -> None:
        self.api = base_url(api)
        self._api_key = api_key

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}

    def ask(self, path: str) -> bytes:
        """The body of GET `path`. Raises NotRunning, Refused, or the node's own error."""
        import httpx

        try:
            answer = httpx.get(self.api + path, headers=self.headers, timeout=ASK_TIMEOUT_S)
        except httpx.TransportError as error:
            raise no_answer(self.api, error) from error
        if answer.is_error:
            raise refusal(self.api, answer)
        return answer.content

    def node(self, *, ticket: bool = False) -> NodeReport:
        return decoded(self.ask("/v1/node?ticket=1" if ticket else "/v1/node"), NodeReport)

    def mesh(self) -> MeshReport:
        return decoded(self.ask("/v1/mesh"), MeshReport)


def decoded(body: bytes, kind: type[Report]) -> Report:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LocalError(
            f"what answered is no shoal node, or one of another version: {error}",
            hint="shoal doctor",
        ) from error


def base_url(api: str) -> str:
    """`http://host:port` of an address as people write it: with or without scheme or `/v1`."""
    url = api if "://" in api else f"http://{api}"
    parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidRequest(f"{api!r} is no address of an API", hint=f"--api {DEFAULT_API}")
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def no_answer(api: str, error: httpx.TransportError) -> NotRunning:
    import httpx

    why = "nothing listens there" if isinstance(error, httpx.ConnectError) else str(error)
    return NotRunning(f"no node answers at {api}: {why}", hint="shoal up")


def refusal(api: str, answer: httpx.Response) -> ShoalError:
    """The node's error object as an error of ours, with the exit code that fits."""
    body = spoken(answer)
    if body is None:
        said = f"HTTP {answer.status_code} {answer.reason_phrase}"
        return LocalError(f"what answers at {api} is no shoal node: {said}", hint="shoal doctor")
    if answer.status_code == 401:
        return Refused(f"{api} wants an API key", hint="--api-key KEY, or SHOAL_API_KEY")
    return error_of(body)


def spoken(answer: httpx.Response) -> dict[str, Any] | None:
    """The OpenAI-style error object of an answer; None when it has none."""
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, dict) else None


def error_of(body: Mapping[str, Any]) -> ShoalError:
    """`{"message", "code", ...}` as the class of that code, so that its exit code is ours too."""
    code = str(body.get("code") or "")
    message, _, hint = str(body.get("message") or "the node gave no reason").partition("; try: ")
    error = _BY_CODE.get(code, LocalError)(message, hint=hint)
    error.code = code or error.code
    return error


def error_classes(root: type[ShoalError] = ShoalError) -> dict[str, type[ShoalError]]:
    """Every class of the error tree by its code, the nearest to the root where two share one."""
    found = {root.code: root}
    for child in root.__subclasses__():
        found = error_classes(child) | found
    return found


_BY_CODE = error_classes()


def running_api(runtime_file: Path) -> str:
    """Where the node of this machine listens, by the note that it left; else the default port."""
    try:
        return str(json.loads(runtime_file.read_text())["api"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_API


def connect(api: str | None, api_key: str | None) -> NodeClient:
    """The node that flags, settings or its own note name. Raises BadConfig for bad settings."""
    from ..config import load_settings

    settings = load_settings({"api_key": api_key})
    return NodeClient(api or running_api(settings.folders.runtime_file), settings.api_key)
