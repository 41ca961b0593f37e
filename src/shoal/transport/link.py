"""A link over any ordered stream of bytes: framing, queue, back-pressure, signs of life."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import LinkClosed, Overloaded, PeerError, ShoalError
from ..identity import Card
from ..units import NodeId
from .base import OnFrame, OnLost
from .frames import Bytes, Frame, FrameLimits, FrameReader, check_sendable, encode, in_parts
from .heartbeat import Pulse

_PIECE_BYTES = 256 << 10  # larger writes only fill the carrier's buffers
_JOIN_BYTES = 128 << 10  # up to here one copy is cheaper than two writes


@dataclass(kw_only=True, frozen=True, slots=True)
class LinkConfig:
    frames: FrameLimits = FrameLimits()
    max_queued_bytes: int = 64 << 20  # beyond it `send` raises Overloaded
    low_queued_bytes: int = 1 << 20  # below it `drain` returns


class Wire(Protocol):
    """A stream of bytes as a carrier provides it, not reading at first.

    It calls the link's `bytes_came`, `set_writable` and `wire_lost`.
    """

    def write(self, data: Bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class WireLink:
    """A `Link` over a `Wire`; `clock` gives the seconds of its pulse."""

    def __init__(
        self, wire: Wire, card: Card, *, config: LinkConfig, clock: Callable[[], float]
    ) -> None:
        now = clock()
        self.pulse = Pulse(heard_at=now, said_at=now, deaf=True)
        self._wire, self._card, self._config, self._clock = wire, card, config, clock
        self._reader = FrameReader(config.frames)
        self._early = b""  # came before `start`
        self._on_frame: OnFrame | None = None
        self._on_lost: OnLost | None = None
        self._ended = False
        self._cause: ShoalError | None = None  # why it ended, if `on_lost` could not be told
        self._queue: deque[Bytes] = deque()
        self._bulk: deque[Bytes] = deque()  # goes when nothing else waits
        self._queued_bytes = 0
        self._writable = True
        self._drained: list[asyncio.Future[None]] = []

    @property
    def peer(self) -> NodeId:
        return self._card.node

    @property
    def card(self) -> Card:
        return self._card

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    @property
    def unfinished_bytes(self) -> int:
        return self._reader.unfinished_bytes

    def start(self, on_frame: OnFrame, on_lost: OnLost) -> None:
        self._on_frame, self._on_lost = on_frame, on_lost
        early, self._early = self._early, b""
        if self._cause is not None:
            on_lost(self._cause)
            return
        self.resume()
        if early:
            self.bytes_came(early)

    def send(self, frame: Frame) -> None:
        if self._ended:
            raise LinkClosed(f"the link to {self.peer} has ended")
        check_sendable(frame, self._config.frames)
        buffers = list(in_parts(frame)) if frame.bulk else encode(frame)
        size = sum(map(len, buffers))
        if self._queued_bytes + size > self._config.max_queued_bytes:
            raise Overloaded(f"{self._queued_bytes} bytes wait for {self.peer} already")
        self.pulse.said_at = self._clock()
        if frame.bulk:
            self._bulk.extend(buffers)
        else:
            self._queue.extend([b"".join(buffers)] if size <= _JOIN_BYTES else buffers)
        self._queued_bytes += size
        self._pump()

    async def drain(self) -> None:
        if self._ended:
            raise LinkClosed(f"the link to {self.peer} has ended")
        if self._queued_bytes > self._config.low_queued_bytes:
            drained = asyncio.get_running_loop().create_future()
            self._drained.append(drained)
            await drained

    def pause(self) -> None:
        if not self._ended:
            self.pulse.deaf = True
            self._wire.pause_reading()

    def resume(self) -> None:
        if not self._ended:
            self.pulse.deaf = False
            self.pulse.heard_at = self._clock()
            self._wire.resume_reading()

    def close(self) -> None:
        if not self._ended:
            self._end()
            self._wire.close()

    def abort(self) -> None:
        if not self._ended:
            self._end()
            self._wire.abort()

    # What the carrier calls.

    def bytes_came(self, data: bytes) -> None:
        if self._on_frame is None:
            self._early += data
            return
        self.pulse.heard_at = self._clock()
        try:
            for frame in self._reader.receive(data):
                if self._ended:
                    return
                self._on_frame(frame)
        except PeerError as fault:
            self._fail(fault)

    def set_writable(self, writable: bool) -> None:
        self._writable = writable
        self._pump()

    def wire_lost(self, cause: ShoalError) -> None:
        self._fail(cause)

    def _pump(self) -> None:
        """Write while the wire takes more; it may say stop in the middle."""
        while (queue := self._queue or self._bulk) and self._writable and not self._ended:
            piece = queue.popleft()
            if len(piece) > _PIECE_BYTES:
                view = memoryview(piece)
                piece = view[:_PIECE_BYTES]
                self._queue.appendleft(view[_PIECE_BYTES:])
            self._queued_bytes -= len(piece)
            self._wire.write(piece)
        if self._drained and self._queued_bytes <= self._config.low_queued_bytes:
            self._wake(None)

    def _fail(self, cause: ShoalError) -> None:
        if not self._ended:
            self.abort()
            if self._on_lost is not None:
                self._on_lost(cause)
            else:
                self._cause = cause

    def _end(self) -> None:
        self._ended = True
        self._queue.clear()
        self._bulk.clear()
        self._queued_bytes = 0
        self._wake(LinkClosed(f"the link to {self.peer} has ended"))

    def _wake(self, error: LinkClosed | None) -> None:
        waiting, self._drained = self._drained, []
        for drained in waiting:
            if drained.done():
                continue
            if error is None:
                drained.set_result(None)
            else:
                drained.set_exception(error)
