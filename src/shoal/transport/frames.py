"""Frames without I/O: bytes in, whole frames out.

On the wire, big-endian::

    u32 length of all that follows | u8 version | u8 channel | u32 header length | header | body

The header is a msgspec message that belongs to the channel, the body raw tensor bytes. Every
length is checked against the limits before a byte is allocated for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import BadFrame, FrameTooLarge

VERSION = 1
CONTROL = 0  # the channel of the transport itself
PIPELINE = 1

_PREFIX = struct.Struct(">IBBI")
_COUNTED = _PREFIX.size - 4  # what the length field counts beside header and body

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Frame:
    """One message between two nodes. Whoever sends a mutable body leaves it alone afterwards."""

    channel: int
    header: bytes
    body: Bytes = b""


@dataclass(kw_only=True, frozen=True, slots=True)
class FrameLimits:
    max_header_bytes: int = 64 << 10
    max_body_bytes: int = 32 << 20


def encode(frame: Frame) -> list[bytes | memoryview]:
    """The buffers to write, in order; the body is not copied."""
    body = memoryview(frame.body).cast("B")
    length = _COUNTED + len(frame.header) + len(body)
    head = _PREFIX.pack(length, VERSION, frame.channel, len(frame.header)) + frame.header
    return [head, body] if body else [head]


def check_sendable(frame: Frame, limits: FrameLimits) -> None:
    """Raise ValueError for a frame that the other side would refuse: a bug of the sender."""
    header_bytes, body_bytes = len(frame.header), memoryview(frame.body).nbytes
    if header_bytes > limits.max_header_bytes or body_bytes > limits.max_body_bytes:
        raise ValueError(f"frame of {header_bytes} + {body_bytes} bytes exceeds {limits}")


class FrameReader:
    """Puts frames together from bytes that arrive in any cut.

    A body that lies within one piece of input is handed on as a view of it, unless it would pin
    more than twice its size; a body that spans pieces is written once, into a buffer of its length.
    """

    def __init__(self, limits: FrameLimits | None = None) -> None:
        self._limits = limits or FrameLimits()
        self._head = bytearray()  # prefix and header, as far as they have come
        self._body = bytearray()  # allocated in full when the head is complete
        self._filled = 0  # bytes of the body that have come
        self._in_body = False

    def receive(self, data: bytes) -> list[Frame]:
        """All frames that `data` completes.

        Raises BadFrame or FrameTooLarge; the reader is then of no more use.
        """
        frames = []
        at, end = 0, len(data)
        while at < end:
            if self._in_body:
                at = self._fill_body(data, at)
                if self._filled == len(self._body):
                    frames.append(self._finish(memoryview(self._body)))
            else:
                at = self._fill_head(data, at)
                if self._head_is_complete():
                    at, frame = self._begin_body(data, at)
                    if frame is not None:
                        frames.append(frame)
        return frames

    def _fill_head(self, data: bytes, at: int) -> int:
        """Take bytes up to the end of the prefix, then up to the end of the header."""
        missing = _PREFIX.size - len(self._head)
        if missing > 0:
            taken = data[at : at + missing]
            self._head += taken
            at += len(taken)
            if len(self._head) < _PREFIX.size:
                return at
            self._check_prefix()
        taken = data[at : at + _PREFIX.size + self._lengths()[0] - len(self._head)]
        self._head += taken
        return at + len(taken)

    def _lengths(self) -> tuple[int, int]:
        """Of header and body, once the prefix has come."""
        length, _, _, header_bytes = _PREFIX.unpack_from(self._head)
        return header_bytes, length - _COUNTED - header_bytes

    def _check_prefix(self) -> None:
        version = self._head[4]
        if version != VERSION:
            raise BadFrame(f"frame version {version}, this node speaks {VERSION}")
        header_bytes, body_bytes = self._lengths()
        if body_bytes < 0:
            raise BadFrame("a frame shorter than its own header")
        if header_bytes > self._limits.max_header_bytes:
            raise FrameTooLarge(f"a header of {header_bytes} bytes")
        if body_bytes > self._limits.max_body_bytes:
            raise FrameTooLarge(f"a body of {body_bytes} bytes")

    def _head_is_complete(self) -> bool:
        return (
            len(self._head) >= _PREFIX.size and len(self._head) == _PREFIX.size + self._lengths()[0]
        )

    def _begin_body(self, data: bytes, at: int) -> tuple[int, Frame | None]:
        """Hand on the body as it lies in `data`, or make room for one that will come in pieces."""
        body_bytes = self._lengths()[1]
        stop = at + body_bytes
        if stop <= len(data):
            body = memoryview(data)[at:stop]
            return stop, self._finish(body if 2 * body_bytes >= len(data) else bytes(body))
        self._body, self._filled, self._in_body = bytearray(body_bytes), 0, True
        return at, None

    def _fill_body(self, data: bytes, at: int) -> int:
        taken = memoryview(data)[at : at + len(self._body) - self._filled]
        self._body[self._filled : self._filled + len(taken)] = taken
        self._filled += len(taken)
        return at + len(taken)

    def _finish(self, body: Bytes) -> Frame:
        frame = Frame(self._head[5], bytes(self._head[_PREFIX.size :]), body)
        self._head, self._body, self._in_body = bytearray(), bytearray(), False
        return frame
