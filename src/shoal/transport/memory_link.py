"""Links of the in-memory network: frames that take their time on the way, in order.

A frame goes as pieces, as bytes do: each occupies what it passes through, tells the other end that
we live, and counts against what may be under way; the frame is there with its last piece.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol

from ..errors import LinkClosed, Overloaded, PeerError, ShoalError
from ..identity import Card
from ..units import NodeId
from .base import OnFrame, OnLost
from .frames import PART_BYTES, Frame, check_sendable
from .heartbeat import Pulse
from .link import LinkConfig

PIECE_BYTES = 256 << 10
FRAMING_BYTES = 10  # of each frame, beside header and body


@dataclass(slots=True)
class Pipe:
    """Something that carries one piece after the other, for all who send through it."""

    bytes_per_s: float
    free_at: float = 0.0


@dataclass(kw_only=True, frozen=True, slots=True)
class Path:
    """The way from one node to another, in one direction. `pipes` are what it shares with other
    ways, a network card for example: each takes its time for each byte, all of them at once.
    """

    delay_s: float = 0.0  # one way
    jitter_s: float = 0.0  # added to the delay, evenly distributed
    loss: float = 0.0  # share of pieces that have to be sent again
    resend_s: float = 0.2  # what sending again costs
    bytes_per_s: float = 0.0  # of this link alone; 0 = unlimited
    pipes: tuple[Pipe, ...] = ()


class Ground(Protocol):
    """What a lane needs of its network."""

    window_bytes: int

    def is_silent(self, a: NodeId, b: NodeId) -> bool:
        """Nothing gets from `a` to `b`, and nobody is told."""

    def delay_s(self, path: Path) -> float:
        """How long one piece is under way, without what bandwidth adds."""

    def weigh(self, frame: Frame) -> int:
        """How many bytes it stands for beside its own."""

    def carried(self, a: NodeId, b: NodeId, count: int) -> None:
        """So many bytes were sent from `a` to `b`."""

    def forget(self, lane: Lane) -> None: ...


class _End:
    """In place of a frame: the stream ends here."""

    def __init__(self, why: str) -> None:
        self.why = why


Item = Frame | _End | None  # None: a piece of a frame that is not complete


class Lane:
    """One direction of a stream. Pieces wait here for their time; `reader` takes them."""

    writer: MemoryLink
    reader: MemoryLink

    def __init__(
        self, ground: Ground, sender: NodeId, receiver: NodeId, path: Path, context: Context
    ) -> None:
        """Whatever happens at the receiving end happens in its `context`."""
        self.sender, self.receiver, self.path = sender, receiver, path
        self._ground, self._context = ground, context
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, Item]] = deque()
        self._due = 0  # so many of those have arrived and may be read
        self._last_arrival = self._sent_at = self._loop.time()
        self._bytes = 0
        self.closed = False  # nothing more goes in

    def carry(self, size: int, item: Item) -> None:
        if self.closed:
            return
        arrival = self._arrival(size)
        self._waiting.append((size, item))
        self._bytes += size
        self._ground.carried(self.sender, self.receiver, size)
        if arrival <= self._loop.time():
            self._loop.call_soon(self._arrive, context=self._context)
        else:
            self._loop.call_at(arrival, self._arrive, context=self._context)
        if self._bytes >= self._ground.window_bytes:
            self.writer.set_writable(False)

    def _arrival(self, size: int) -> float:
        """Each pipe is taken from when the one before it begins to give; no piece overtakes."""
        path, starts = self.path, self._loop.time()
        sent = starts = max(starts, self._sent_at) if path.bytes_per_s else starts
        if path.bytes_per_s:
            sent = self._sent_at = starts + size / path.bytes_per_s
        for pipe in path.pipes:
            starts = max(starts, pipe.free_at)
            pipe.free_at = starts + size / pipe.bytes_per_s
            sent = max(sent, pipe.free_at)
        self._last_arrival = max(self._last_arrival, sent + self._ground.delay_s(path))
        return self._last_arrival

    def _arrive(self) -> None:
        self._due += 1
        self.flush()

    def flush(self) -> None:
        """Hand over what has arrived, as far as the reader reads and the network is up."""
        while self._due and self._waiting and self._may_deliver():
            self._due -= 1
            size, item = self._waiting.popleft()
            self._bytes -= size
            if isinstance(item, _End):
                self.drop()
                self.reader.lost(item.why)
                return
            if self._bytes < self._ground.window_bytes:
                self.writer.set_writable(True)
            self.reader.deliver(size, item)

    def flush_soon(self) -> None:
        self._loop.call_soon(self.flush, context=self._context)

    def _may_deliver(self) -> bool:
        return self.reader.reading and not self._ground.is_silent(self.sender, self.receiver)

    def end(self, why: str) -> None:
        """What was sent so far still arrives, then the reader learns that the stream has ended."""
        self.carry(0, _End(why))
        self.closed = True

    def break_off(self, why: str) -> None:
        """Nothing that is under way arrives; the reader learns of it now."""
        self.drop()
        self._loop.call_soon(self.reader.lost, why, context=self._context)

    def drop(self) -> None:
        """Nothing that is under way arrives, nor what comes after it, and nobody is told."""
        self.closed = True
        self._waiting.clear()
        self._ground.forget(self)


class MemoryLink:
    """A `Link` over two lanes."""

    def __init__(
        self,
        card: Card,
        out: Lane,
        back: Lane,
        ground: Ground,
        *,
        config: LinkConfig,
        clock: Callable[[], float],
    ) -> None:
        now = clock()
        self.pulse = Pulse(heard_at=now, said_at=now, deaf=True)
        self.reading = False
        self._card, self._config, self._clock = card, config, clock
        self._out, self._back, self._ground = out, back, ground
        self._on_frame: OnFrame | None = None
        self._on_lost: OnLost | None = None
        self._cause: ShoalError | None = None  # why it ended, if `on_lost` could not be told
        self._ended = False
        self._queue: deque[tuple[int, Frame]] = deque()  # bytes to go
        self._bulk: deque[tuple[int, Frame]] = deque()  # goes when nothing else waits
        self._queued_bytes = self._unfinished_bytes = 0
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
        return self._unfinished_bytes

    def start(self, on_frame: OnFrame, on_lost: OnLost) -> None:
        self._on_frame, self._on_lost = on_frame, on_lost
        if self._cause is not None:
            on_lost(self._cause)
        else:
            self.resume()

    def send(self, frame: Frame) -> None:
        if self._ended:
            raise LinkClosed(f"the link to {self.peer} has ended")
        check_sendable(frame, self._config.frames)
        if not isinstance(frame.body, bytes):  # the sender's memory, which it may use again
            frame = Frame(frame.channel, frame.header, bytes(frame.body), frame.bulk)
        size = FRAMING_BYTES + len(frame.header) + len(frame.body) + self._ground.weigh(frame)
        if self._queued_bytes + size > self._config.max_queued_bytes:
            raise Overloaded(f"{self._queued_bytes} bytes wait for {self.peer} already")
        self.pulse.said_at = self._clock()
        (self._bulk if frame.bulk else self._queue).append((size, frame))
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
            self.pulse.deaf, self.reading = True, False

    def resume(self) -> None:
        if not self._ended:
            self.pulse.deaf, self.reading = False, True
            self.pulse.heard_at = self._clock()
            self._back.flush_soon()

    def close(self) -> None:
        if not self._ended:
            self._end()
            self._out.end("the connection ended")

    def abort(self) -> None:
        if not self._ended:
            self._end()
            self._out.end("the connection was reset")

    # What the lanes call.

    def deliver(self, size: int, frame: Frame | None) -> None:
        self.pulse.heard_at = self._clock()
        self._unfinished_bytes += size
        if frame is None or self._ended or self._on_frame is None:
            return
        self._unfinished_bytes = 0
        try:
            self._on_frame(frame)
        except PeerError as fault:
            self._fail(fault)

    def set_writable(self, writable: bool) -> None:
        if writable != self._writable:
            self._writable = writable
            self._pump()

    def lost(self, why: str) -> None:
        self._fail(LinkClosed(why))

    def _pump(self) -> None:
        """Write while the lane takes more; it may say stop in the middle."""
        while (queue := self._queue or self._bulk) and self._writable and not self._ended:
            left, frame = queue.popleft()
            piece = min(left, PART_BYTES if frame.bulk else PIECE_BYTES)
            if piece < left:
                queue.appendleft((left - piece, frame))
            self._queued_bytes -= piece
            self._out.carry(piece, frame if piece == left else None)
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
        self._back.drop()
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
