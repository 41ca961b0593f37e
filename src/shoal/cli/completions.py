"""Reads a streamed answer of the OpenAI-style API, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from time import perf_counter
from typing import Any

import msgspec

from ..errors import InvalidRequest, LocalError, ShoalError
from .client import NodeClient, error_of, no_answer, refusal

ANSWER_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 5.0


class Piece(msgspec.Struct, frozen=True):
    """One server-sent event: some text, perhaps the end, perhaps the final count of tokens."""

    text: str = ""
    finish: str = ""
    tokens: int = 0


class Tally:
    """What a stream amounted to: its text, its tokens, and when the first and the last came."""

    def __init__(self) -> None:
        self.text = ""
        self.finish = ""
        self.tokens = 0
        self._asked = perf_counter()
        self._first = self._last = self._asked

    def add(self, piece: Piece) -> None:
        if piece.text or piece.finish:
            self._last = perf_counter()
            if not self.text and not self.finish:
                self._first = self._last
        self.text += piece.text
        self.finish = piece.finish or self.finish
        self.tokens = piece.tokens or self.tokens

    @property
    def ttft_s(self) -> float:
        return self._first - self._asked

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first: what decoding gives; 0 when there was no second."""
        took = self._last - self._first
        return (self.tokens - 1) / took if took > 0 and self.tokens > 1 else 0.0


def stream_answer(client: NodeClient, path: str, body: Mapping[str, Any]) -> Iterator[Piece]:
    """The pieces of POST `path`. Raises the node's error, also one that comes in mid-stream,
    and LocalError when the stream ends without saying so."""
    import httpx

    timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with httpx.stream(
            "POST", client.api + path, json=asked, headers=client.headers, timeout=timeout
        ) as answer:
            if answer.is_error:
                answer.read()
                raise refusal(client.api, answer)
            yield from pieces(answer.iter_lines())
    except httpx.ConnectError as error:
        raise no_answer(client.api, error) from error
    except httpx.TransportError as error:
        raise LocalError(f"the answer broke off: {error}", hint="shoal status") from error


def pieces(lines: Iterable[str]) -> Iterator[Piece]:
    """The pieces of an event stream, up to its `[DONE]`."""
    for line in lines:
        field, _, value = line.partition(":")
        if field != "data":
            continue
        if value.strip() == "[DONE]":
            return
        yield piece_of(value)
    raise LocalError("the answer broke off: the stream ended without [DONE]", hint="shoal status")


def piece_of(event: str) -> Piece:
    """One chunk of /v1/completions or /v1/chat/completions."""
    try:
        chunk = msgspec.json.decode(event)
    except msgspec.DecodeError as error:
        raise LocalError(f"an event of the answer cannot be read: {error}") from error
    if "error" in chunk:
        raise error_of(chunk["error"])
    choice: dict[str, Any] = next(iter(chunk.get("choices") or ()), {})
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    tokens = (chunk.get("usage") or {}).get("completion_tokens", 0)
    return Piece(text, choice.get("finish_reason") or "", tokens)


def lacks_chat_template(error: ShoalError) -> bool:
    """True when the model can only continue text: the node says so in its refusal."""
    return isinstance(error, InvalidRequest) and "chat template" in error.message
