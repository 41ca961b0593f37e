"""A link over any ordered stream of bytes: framing, queue, back-pressure, signs of life."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..errors import LinkClosed, Overloaded, PeerError, ShoalError
from ..identity import Card
from ..units import NodeId
from .base import OnFrame, OnLost
from .frames import Bytes, Frame, FrameLimits, FrameReader, check_sendable, encode, in_parts
from .heartbeat import Pulse

Piece = TypeVar("Piece")

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


class QueuedLink(ABC, Generic[Piece]):
    """What every `Link` does, whatever it is made of: who is at the other end, what waits to be
    sent, and how it ends. `clock` gives the seconds of its pulse.
    """

    def __init__(self, card: Card, *, config: LinkConfig, clock: Callable[[], float]) -> None:
        now = clock()
        self.pulse = Pulse(heard_at=now, said_at=now, deaf=True)
        self._card, self._config, self._clock = card, config, clock
        self._on_frame: OnFrame | None = None
        self._on_lost: OnLost | None = None
        self._ended = False
        self._cause: ShoalError | None = None  # why it ended, if `on_lost` could not be told
        self._queue: deque[Piece] = deque()
        self._bulk: deque[Piece] = deque()  # goes when nothing else waits
        self._queued_bytes = 0
        self._writable = True
        self._drained: list[asyncio.Future[None]] = []

    # What the stream below has to know how to do.

    @abstractmethod
    def _write_from(self, queue: deque[Piece]) -> int:
        """Write what stands first, or a part of it; returns how many bytes that was."""

    @abstractmethod
    def _read(self, on: bool) -> None:
        """Go on reading, or stop."""

    @abstractmethod
    def _finish(self, *, reset: bool) -> None:
        """End the stream: after what was written, or at once."""

    # What a `Link` promises.

    @property
    def peer(self) -> NodeId:
        return self._card.node

    @property
    def card(self) -> Card:
        return self._card

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    async def drain(self) -> None:
        self._check_open()
        if self._queued_bytes > self._config.low_queued_bytes:
            drained = asyncio.get_running_loop().create_future()
            self._drained.append(drained)
            await drained

    def pause(self) -> None:
        if not self._ended:
            self.pulse.deaf = True
            self._read(False)

    def resume(self) -> None:
        if not self._ended:
            self.pulse.deaf = False
            self.pulse.heard_at = self._clock()
            self._read(True)

    def close(self) -> None:
        if not self._ended:
            self._end()
            self._finish(reset=False)

    def abort(self) -> None:
        if not self._ended:
            self._end()
            self._finish(reset=True)

    # Its working.

    def _check_open(self) -> None:
        if self._ended:
            raise LinkClosed(f"the link to {self.peer} has ended")

    def _queue_up(self, pieces: Sequence[Piece], size: int, *, bulk: bool) -> None:
        if self._queued_bytes + size > self._config.max_queued_bytes:
            raise Overloaded(f"{self._queued_bytes} bytes wait for {self.peer} already")
        self.pulse.said_at = self._clock()
        (self._bulk if bulk else self._queue).extend(pieces)
        self._queued_bytes += size
        self._pump()

    def set_writable(self, writable: bool) -> None:
        if writable != self._writable:
            self._writable = writable
            self._pump()

    def _pump(self) -> None:
        """Write while the stream takes more; it may say stop in the middle."""
        while (queue := self._queue or self._bulk) and self._writable and not self._ended:
            written = self._write_from(queue)  # the link may have ended meanwhile
            self._queued_bytes = max(0, self._queued_bytes - written)
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


class WireLink(QueuedLink[Bytes]):
    """A `Link` over a `Wire`."""

    def __init__(
        self, wire: Wire, card: Card, *, config: LinkConfig, clock: Callable[[], float]
    ) -> None:
        super().__init__(card, config=config, clock=clock)
        self._wire = wire
        self._reader = FrameReader(config.frames)
        self._early = b""  # came before `start`

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
        self._check_open()
        check_sendable(frame, self._config.frames)
        buffers = list(in_parts(frame)) if frame.bulk else encode(frame)
        size = sum(map(len, buffers))
        if not frame.bulk and size <= _JOIN_BYTES:
            buffers = [b"".join(buffers)]
        self._queue_up(buffers, size, bulk=frame.bulk)

    # What the carrier calls, `set_writable` beside these.

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

    def wire_lost(self, cause: ShoalError) -> None:
        self._fail(cause)

    # What a `QueuedLink` needs.

    def _write_from(self, queue: deque[Bytes]) -> int:
        piece = queue.popleft()
        if len(piece) > _PIECE_BYTES:
            view = memoryview(piece)
            piece = view[:_PIECE_BYTES]
            queue.appendleft(view[_PIECE_BYTES:])
        self._wire.write(piece)
        return len(piece)

    def _read(self, on: bool) -> None:
        (self._wire.resume_reading if on else self._wire.pause_reading)()

    def _finish(self, *, reset: bool) -> None:
        (self._wire.abort if reset else self._wire.close)()
