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

from ..errors import LinkClosed, PeerError
from ..identity import Card
from ..units import NodeId
from .base import OnFrame, OnLost
from .frames import PART_BYTES, Frame, check_sendable
from .link import LinkConfig, QueuedLink

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


class MemoryLink(QueuedLink[tuple[int, Frame]]):
    """A `Link` over two lanes. In its queues: a frame, and how many of its bytes are to go."""

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
        super().__init__(card, config=config, clock=clock)
        self.reading = False
        self._out, self._back, self._ground = out, back, ground
        self._unfinished_bytes = 0

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
        self._check_open()
        check_sendable(frame, self._config.frames)
        if not isinstance(frame.body, bytes):  # the sender's memory, which it may use again
            frame = Frame(frame.channel, frame.header, bytes(frame.body), frame.bulk)
        size = FRAMING_BYTES + len(frame.header) + len(frame.body) + self._ground.weigh(frame)
        self._queue_up([(size, frame)], size, bulk=frame.bulk)

    # What the lanes call, `set_writable` beside these.

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

    def lost(self, why: str) -> None:
        self._fail(LinkClosed(why))

    # What a `QueuedLink` needs.

    def _write_from(self, queue: deque[tuple[int, Frame]]) -> int:
        left, frame = queue.popleft()
        piece = min(left, PART_BYTES if frame.bulk else PIECE_BYTES)
        if piece < left:
            queue.appendleft((left - piece, frame))
        self._out.carry(piece, frame if piece == left else None)
        return piece

    def _read(self, on: bool) -> None:
        self.reading = on
        if on:
            self._back.flush_soon()

    def _finish(self, *, reset: bool) -> None:
        self._back.drop()
        self._out.end("the connection was reset" if reset else "the connection ended")
