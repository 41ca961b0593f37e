"""Frames without I/O: bytes in, whole frames out.

On the wire, big-endian::

    u32 length of all that follows | u8 version | u8 channel | u32 header length | header | body

The header is a msgspec message that belongs to the channel, the body raw tensor bytes. Every
length is checked against the limits before a byte is allocated for it.

A large frame that others may overtake travels in parts: frames of their own whose bodies, one after
the other, are the frame as it would have been written. Others go between them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import BadFrame, FrameTooLarge

VERSION = 1
CONTROL = 0  # the channel of the transport itself
PART = 255  # the channel of parts
PART_BYTES = 64 << 10

_PREFIX = struct.Struct(">IBBI")
_COUNTED = _PREFIX.size - 4  # what the length field counts beside header and body

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Frame:
    """One message between two nodes. Whoever sends a mutable body leaves it alone afterwards.

    `bulk` is for the sender alone: frames that are not bulk overtake it. Those that are keep their
    order, and so do those that are not.
    """

    channel: int
    header: bytes
    body: Bytes = b""
    bulk: bool = field(default=False, compare=False)


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


def in_parts(frame: Frame) -> Iterator[bytes]:
    """What to write for it, in pieces that others may come between. Each byte is copied once."""
    buffers = encode(frame)
    if sum(map(len, buffers)) <= PART_BYTES:
        yield b"".join(buffers)
        return
    for buffer in buffers:
        view = memoryview(buffer)
        for at in range(0, len(view), PART_BYTES):
            yield b"".join(encode(Frame(PART, b"", view[at : at + PART_BYTES])))


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

    def __init__(self, limits: FrameLimits | None = None, *, inner: bool = False) -> None:
        """An `inner` one puts together what came in parts, and takes none itself."""
        self._limits = limits or FrameLimits()
        self._parts = None if inner else FrameReader(self._limits, inner=True)
        self._rest = b""  # the beginning of a frame whose header is not complete yet
        self._head = 0, b""  # channel and header of the frame whose body is being filled
        self._body: bytearray | None = None  # allocated in full when the header is complete
        self._filled = 0

    @property
    def unfinished_bytes(self) -> int:
        """What is kept of a frame that has not come completely."""
        parts = self._parts.unfinished_bytes if self._parts is not None else 0
        return parts + len(self._rest) + (self._filled if self._body is not None else 0)

    def receive(self, data: bytes) -> list[Frame]:
        """All frames that `data` completes.

        Raises BadFrame or FrameTooLarge; the reader is then of no more use.
        """
        frames: list[Frame] = []
        at = self._fill_body(data, frames) if self._body is not None else 0
        if self._rest:
            data, self._rest = self._rest + data, b""
        while at < len(data) and self._body is None:
            at = self._read_frame(data, at, frames)
        return frames

    def _read_frame(self, data: bytes, at: int, frames: list[Frame]) -> int:
        """Read one frame, or begin it, and return where the next one starts."""
        if len(data) - at < _PREFIX.size:
            return self._keep(data, at)
        length: int
        header_bytes: int
        length, version, channel, header_bytes = _PREFIX.unpack_from(data, at)
        body_bytes = length - _COUNTED - header_bytes
        self._check(version, header_bytes, body_bytes)
        body_at = at + _PREFIX.size + header_bytes
        if body_at > len(data):
            return self._keep(data, at)
        header, stop = data[body_at - header_bytes : body_at], body_at + body_bytes
        if stop <= len(data):
            body = memoryview(data)[body_at:stop]
            small = 2 * body_bytes < len(data)
            self._came(Frame(channel, header, bytes(body) if small else body), frames)
            return stop
        self._head, self._body, self._filled = (channel, header), bytearray(body_bytes), 0
        return body_at + self._fill_body(memoryview(data)[body_at:], frames)

    def _check(self, version: int, header_bytes: int, body_bytes: int) -> None:
        if version != VERSION:
            raise BadFrame(f"frame version {version}, this node speaks {VERSION}")
        if body_bytes < 0:
            raise BadFrame("a frame shorter than its own header")
        if header_bytes > self._limits.max_header_bytes:
            raise FrameTooLarge(f"a header of {header_bytes} bytes")
        if body_bytes > self._limits.max_body_bytes:
            raise FrameTooLarge(f"a body of {body_bytes} bytes")

    def _keep(self, data: bytes, at: int) -> int:
        """What is too short to begin a frame waits for more."""
        self._rest = data[at:]
        return len(data)

    def _fill_body(self, data: Bytes, frames: list[Frame]) -> int:
        """Take what belongs to the body that is being filled; how many bytes that was."""
        assert self._body is not None  # noqa: S101  for the type checker
        taken = memoryview(data)[: len(self._body) - self._filled]
        self._body[self._filled : self._filled + len(taken)] = taken
        self._filled += len(taken)
        if self._filled == len(self._body):
            self._came(Frame(*self._head, memoryview(self._body)), frames)
            self._body = None
        return len(taken)

    def _came(self, frame: Frame, frames: list[Frame]) -> None:
        if frame.channel != PART:
            frames.append(frame)
        elif self._parts is None:
            raise BadFrame("a part within a part")
        else:
            frames += self._parts.receive(bytes(frame.body))
