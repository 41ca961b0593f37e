"""The two ways to hand over an answer: in one piece at the end, or as events while it grows."""

from __future__ import annotations

import asyncio
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import ShoalError
from .choice import Piece
from .failures import body_of
from .shapes import DONE, Result, Shape, Usage
from .stream import EventStream


class Delivery(Protocol):
    async def take(self, index: int, piece: Piece) -> None:
        """One more piece of choice `index`."""
        ...

    async def finish(self, usage: Usage) -> None:
        """All choices are whole."""
        ...

    async def fail(self, error: ShoalError) -> None:
        """Say why there will be no more. Raises `error` when nothing was sent yet."""
        ...

    def drop(self) -> None:
        """Nothing more will be said."""
        ...


class WholeDelivery:
    def __init__(
        self, shape: Shape, choices: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._shape = shape
        self._scope, self._receive, self._send = scope, receive, send
        self._results = [Result() for _ in range(choices)]

    async def take(self, index: int, piece: Piece) -> None:
        self._results[index].add(piece)

    async def finish(self, usage: Usage) -> None:
        body = self._shape.whole(self._results, usage)
        response = Response(body, media_type="application/json")
        await response(self._scope, self._receive, self._send)

    async def fail(self, error: ShoalError) -> None:
        raise error

    def drop(self) -> None:
        """Nothing was begun."""


class StreamDelivery:
    """The last words of the last choice wait for `finish`, to go out with the end of the stream."""

    def __init__(
        self, shape: Shape, choices: int, send: Send, *, include_usage: bool, heartbeat_s: float
    ) -> None:
        self._shape, self._include_usage = shape, include_usage
        self._events = EventStream(send)
        self._heart = asyncio.create_task(self._events.keep_alive(heartbeat_s))
        self._openings: list[bytes] = [shape.opening(index) for index in range(choices)]
        self._going_on = choices
        self._last_words = b""

    async def take(self, index: int, piece: Piece) -> None:
        data = self._openings[index] + self._shape.piece(index, piece)
        self._openings[index] = b""
        if piece.finish:
            data += self._shape.closing(index, piece.finish)
            self._going_on -= 1
        if not self._going_on:
            self._last_words = data
        elif data:
            await self._events.write(data)

    async def finish(self, usage: Usage) -> None:
        self.drop()
        end = self._shape.usage(usage) if self._include_usage else b""
        await self._events.write(self._last_words + end + DONE, last=True)

    async def fail(self, error: ShoalError) -> None:
        self.drop()
        if not self._events.started:
            raise error
        await self._events.write(b"data: " + body_of(error) + b"\n\n", last=True)

    def drop(self) -> None:
        self._heart.cancel()
