"""Everything between us and one other node: carries out what `peering.py` decides."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, assert_never

from ..errors import BadFrame, BadMessage, LinkClosed, Overloaded, PeerError, ShoalError
from ..units import NodeId
from .base import Link
from .control import (
    Beat,
    Confirm,
    Control,
    Enough,
    Goodbye,
    Ping,
    Pong,
    Welcome,
    control_frame,
    decode_control,
)
from .door import TokenBucket
from .frames import CONTROL, Frame
from .peering import (
    CancelDial,
    Dial,
    Discard,
    Down,
    GiveUp,
    Instruction,
    Peering,
    SendConfirm,
    SendWelcome,
    Up,
)

_BEAT = control_frame(Beat())
_TOO_MUCH_TO_ANSWER = 1 << 20  # bytes that wait for a peer
_NO_USE = "the link carried nothing"


@dataclass(kw_only=True, frozen=True, slots=True)
class PeerConfig:
    dial_s: float = 5.0  # for all addresses and carriers together
    max_backlog_bytes: int = 40 << 20  # while it is being dialled
    max_held_bytes: int = 64 << 20  # received and not used yet, see `Links.hold`
    inbound_bytes_per_s: float = 0.0  # 0 = unlimited
    inbound_burst_s: float = 2.0


class Owner(Protocol):
    """What a peer needs from `Links`."""

    async def dial(self, node: NodeId) -> Link: ...
    def deliver(self, node: NodeId, frame: Frame) -> None: ...
    def blame(self, node: NodeId | None, fault: PeerError) -> None: ...
    def link_up(self, node: NodeId) -> None: ...
    def link_lost(self, node: NodeId, reason: str) -> None: ...
    def link_parted(self, node: NodeId, reason: str) -> None: ...
    def ponged(self, node: NodeId, stamp: int) -> None: ...
    def undelivered(self, node: NodeId, reason: str) -> None: ...
    def forget(self, node: NodeId) -> None: ...


class Peer:
    """One other node, from the first attempt at a link until there is none any more."""

    def __init__(self, node: NodeId, owner: Owner, *, ours_wins: bool, config: PeerConfig) -> None:
        self.node = node
        self.used = False  # the live link has carried frames other than ours and theirs about it
        self._parting = False  # it ends, and nobody loses anything by it
        self._owner, self._config = owner, config
        self._loop = asyncio.get_running_loop()
        self._peering: Peering[Link] = Peering(ours_wins=ours_wins)
        self._dial: asyncio.Task[None] | None = None
        self._dialled: Link | None = None  # by us, not welcomed yet
        self._waiting: list[asyncio.Future[None]] = []
        self._backlog: deque[Frame] = deque()
        self._backlog_bytes = 0
        self._held_bytes = 0
        self._throttled = False
        self._why = ""  # the last failure, for messages
        self._bucket: TokenBucket | None = None
        if config.inbound_bytes_per_s:
            self._bucket = TokenBucket(
                config.inbound_bytes_per_s, config.inbound_burst_s, self._loop.time()
            )

    @property
    def live(self) -> Link | None:
        """The link that can be used."""
        return self._peering.live

    async def connect(self) -> None:
        """Return when there is a link. Raises LinkClosed with the reasons if there will be none."""
        self._do(self._peering.wanted())
        if self.live is None:
            ready = self._loop.create_future()
            self._waiting.append(ready)
            await ready

    def send_later(self, frame: Frame) -> None:
        """Keep the frame until there is a link. Raises Overloaded."""
        size = len(frame.header) + memoryview(frame.body).nbytes
        if self._backlog_bytes + size > self._config.max_backlog_bytes:
            raise Overloaded(f"{self._backlog_bytes} bytes wait for {self.node} to be reached")
        self._backlog.append(frame)
        self._backlog_bytes += size
        self._do(self._peering.wanted())

    def arrived(self, link: Link) -> None:
        """The peer has dialled us."""
        self._do(self._peering.arrived(link))
        self._start(link)
        self._loop.call_later(self._config.dial_s, self._expire, link)

    def beat(self) -> None:
        """Say something on a silent link."""
        if self.live is not None and not self.live.queued_bytes:
            self._say(self.live, _BEAT)

    def ping(self, stamp: int) -> None:
        """Ask how far away it is, unless the answer would tell how long our queue is."""
        if self.live is not None and not self.live.queued_bytes:
            self._say(self.live, control_frame(Ping(stamp)))

    def part(self) -> None:
        """End the link, if it has carried nothing."""
        if (link := self.live) is not None and not self.used:
            self._say(link, control_frame(Enough()))
            link.close()
            self._parting = True
            self._ended(link, LinkClosed(_NO_USE))

    def give_up(self, reason: str) -> None:
        """It is dead: end the link at once."""
        if (link := self.live) is not None:
            link.abort()
            self._ended(link, LinkClosed(reason))

    def drop(self, reason: str) -> None:
        """End the link with a goodbye."""
        if (link := self.live) is not None:
            self._say(link, control_frame(Goodbye(reason[:200])))
            link.close()
            self._ended(link, LinkClosed(reason))

    def close(self, reason: str) -> None:
        """We are leaving: goodbye, and nobody is told."""
        if self.live is not None:
            self._say(self.live, control_frame(Goodbye(reason)))
        peering = self._peering
        links = [*peering.offered, *peering.parked, peering.live, peering.answered]
        for link in links:
            if link is not None:
                link.close()
        self._cancel_dial()
        self._settle(LinkClosed(reason))

    def hold(self, count: int) -> None:
        """So many bytes more (or, below 0, less) have been received and are not used yet."""
        self._held_bytes = max(0, self._held_bytes + count)
        self._adjust_reading()

    # Links come and go.

    def _start(self, link: Link) -> None:
        link.start(partial(self._frame_came, link), partial(self._ended, link))

    def _expire(self, link: Link) -> None:
        """What is not confirmed by now never will be."""
        if link in self._peering.offered or link in self._peering.parked:
            link.abort()
            self._ended(link, LinkClosed("the link was never confirmed"))

    def _ended(self, link: Link, cause: ShoalError) -> None:
        self._why = cause.message
        if isinstance(cause, PeerError):
            self._owner.blame(self.node, cause)
        if link is self._dialled:
            self._dial_failed()
        else:
            self._do(self._peering.lost(link))

    async def _try_dial(self) -> None:
        """Ends when it is cancelled: by a welcome, a loss, or because another link has won."""
        try:
            async with asyncio.timeout(self._config.dial_s):
                self._dialled = await self._owner.dial(self.node)
                self._start(self._dialled)
                await self._loop.create_future()
        except LinkClosed as error:
            self._why = error.message
        except TimeoutError:
            self._why = f"no answer within {self._config.dial_s:g} s"
        finally:
            if self._dial is asyncio.current_task():
                self._dial_failed()

    def _dial_failed(self) -> None:
        self._cancel_dial()
        self._do(self._peering.dial_failed())

    def _welcomed(self, link: Link) -> None:
        self._dialled = None
        self._cancel_dial()
        self._do(self._peering.dial_answered(link))

    def _cancel_dial(self) -> None:
        dial, self._dial = self._dial, None
        if dial is not None:
            dial.cancel()
        if self._dialled is not None:
            self._dialled.close()
        self._dialled = None

    # Carrying out what the peering decides.

    def _do(self, instructions: Sequence[Instruction[Link]]) -> None:
        for instruction in instructions:
            self._do_one(instruction)
        if self._peering.idle:
            self._owner.forget(self.node)

    def _do_one(self, instruction: Instruction[Link]) -> None:
        match instruction:
            case Dial():
                self._dial = self._loop.create_task(self._try_dial())
            case CancelDial():
                self._cancel_dial()
            case SendWelcome(link):
                self._say(link, control_frame(Welcome()))
            case SendConfirm(link):
                self._say(link, control_frame(Confirm()))
            case Discard(link):
                link.close()
            case Up(link):
                self._up(link)
            case Down():
                quietly, self._parting = self._parting, False
                tell = self._owner.link_parted if quietly else self._owner.link_lost
                tell(self.node, self._why)
            case GiveUp():
                self._unreachable()
            case _:
                assert_never(instruction)

    def _up(self, link: Link) -> None:
        self._held_bytes, self._throttled = 0, False
        backlog = self._take_backlog()
        self.used = bool(backlog)
        for frame in backlog:
            link.send(frame)
        self._settle(None)
        self._owner.link_up(self.node)

    def _unreachable(self) -> None:
        lost = self._take_backlog()
        self._settle(LinkClosed(f"{self.node} cannot be reached: {self._why}"))
        if lost:
            self._owner.undelivered(self.node, self._why)

    def _take_backlog(self) -> deque[Frame]:
        backlog, self._backlog, self._backlog_bytes = self._backlog, deque(), 0
        return backlog

    def _settle(self, error: LinkClosed | None) -> None:
        """Tell those who wait for a link."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _say(self, link: Link, frame: Frame) -> None:
        with contextlib.suppress(LinkClosed, Overloaded):  # the link itself reports its end
            link.send(frame)

    # Frames.

    def _frame_came(self, link: Link, frame: Frame) -> None:
        if frame.channel == CONTROL:
            self._control_came(link, decode_control(frame))
            return
        if link is not self.live:
            raise BadFrame("a frame before the link was agreed on")
        self.used = True
        if self._bucket is not None:
            self._throttle(self._bucket, len(frame.header) + len(frame.body))
        self._owner.deliver(self.node, frame)

    def _control_came(self, link: Link, message: Control) -> None:
        match message:
            case Beat():
                pass
            case Ping(stamp):
                if link.queued_bytes < _TOO_MUCH_TO_ANSWER:  # who does not read gets no more
                    self._say(link, control_frame(Pong(stamp)))
            case Pong(stamp):
                self._owner.ponged(self.node, stamp)
            case Welcome() if link is self._dialled:
                self._welcomed(link)
            case Confirm() if link in self._peering.offered:
                self._why = "a newer link has replaced it"
                self._do(self._peering.confirmed(link))
            case Goodbye(reason):
                link.close()
                printable = "".join(filter(str.isprintable, reason))  # it may reach a terminal
                self._ended(link, LinkClosed(printable))
            case Enough() if link is self.live:
                link.close()
                self._parting = not self.used  # what we have sent may not have arrived
                self._ended(link, LinkClosed(_NO_USE))
            case _:
                raise BadMessage(f"{type(message).__name__} out of place")

    def _throttle(self, bucket: TokenBucket, count: int) -> None:
        """Spend `count` bytes of what the peer may send, and stop reading while it is in debt."""
        wait_s = bucket.take(count, self._loop.time())
        if count and self._throttled:
            return  # the timer is running and will look again
        self._throttled = wait_s > 0
        self._adjust_reading()
        if self._throttled:
            self._loop.call_later(wait_s, self._throttle, bucket, 0)

    def _adjust_reading(self) -> None:
        if (link := self.live) is None:
            return
        stop = self._throttled or self._held_bytes > self._config.max_held_bytes
        if stop != link.pulse.deaf:
            (link.pause if stop else link.resume)()
