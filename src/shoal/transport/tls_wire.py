"""One TLS connection as asyncio presents it: first the handshake's bytes, then a link's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import cast

from ..errors import LinkClosed
from .frames import Bytes
from .link import WireLink

_WRITE_BUFFER_BYTES = 256 << 10
_TCP_USER_TIMEOUT_MS = 20_000  # frees the kernel's memory; the heartbeat has noticed long before


class TlsWire(asyncio.Protocol):
    """Hands bytes to its link straight from the event loop's callback, without a task in between.

    `open_wires` holds it from the moment it is connected until it is gone.
    """

    def __init__(self, open_wires: set[TlsWire]) -> None:
        self._open_wires = open_wires
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._link: WireLink | None = None
        self._unread = bytearray()  # of the handshake
        self._wanted = 0
        self._enough: asyncio.Future[None] | None = None

    @property
    def tls(self) -> ssl.SSLObject:
        assert self._transport is not None  # noqa: S101  for the type checker
        return cast(ssl.SSLObject, self._transport.get_extra_info("ssl_object"))

    @property
    def unread(self) -> int:
        """Bytes that came beyond those asked for."""
        return len(self._unread)

    async def exactly(self, count: int) -> bytes:
        """The next `count` bytes of the handshake. Raises LinkClosed when it ends before."""
        if len(self._unread) < count:
            if self.gone.done():
                raise LinkClosed("the connection ended during the handshake")
            self._wanted = count
            self._enough = asyncio.get_running_loop().create_future()
            self.resume_reading()
            await self._enough
        taken = bytes(self._unread[:count])
        del self._unread[:count]
        return taken

    def serve(self, link: WireLink) -> None:
        """The handshake is over: from now on the link gets everything, once it has started."""
        self._link = link
        self.pause_reading()
        early, self._unread = bytes(self._unread), bytearray()
        if early:
            link.bytes_came(early)
        if self.gone.done():
            link.wire_lost(LinkClosed("the connection ended"))

    # What the link calls.

    def write(self, data: Bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():  # asyncio would log it
            self._transport.write(data)

    def pause_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._open_wires.add(self)
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # already closed by the peer
            # asyncio does this only for sockets that name their protocol; ours that accept do not
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if option := getattr(socket, "TCP_NOTSENT_LOWAT", None):  # so that little is in front
                sock.setsockopt(socket.IPPROTO_TCP, option, _WRITE_BUFFER_BYTES)
            if option := getattr(socket, "TCP_USER_TIMEOUT", None):  # Linux only
                sock.setsockopt(socket.IPPROTO_TCP, option, _TCP_USER_TIMEOUT_MS)

    def data_received(self, data: bytes) -> None:
        if self._link is not None:
            self._link.bytes_came(data)
            return
        self._unread += data
        if self._enough is not None and len(self._unread) >= self._wanted:
            enough, self._enough = self._enough, None
            self.pause_reading()
            if not enough.done():
                enough.set_result(None)
        elif self._enough is None:
            self.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        why = f"the connection ended{f': {exc}' if exc else ''}"
        if not self.gone.done():
            self.gone.set_result(None)
        if self._enough is not None and not self._enough.done():
            self._enough.set_exception(LinkClosed(why))
        if self._link is not None:
            self._link.wire_lost(LinkClosed(why))
        self._transport = None
        self._open_wires.discard(self)

    def pause_writing(self) -> None:
        if self._link is not None:
            self._link.set_writable(False)

    def resume_writing(self) -> None:
        if self._link is not None:
            self._link.set_writable(True)
