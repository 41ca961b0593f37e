"""All that nodes say to each other about sessions: one frozen union, one screen.

Token ids travel in the frame's body as little-endian u32, hidden states as raw tensor bytes; the
header stays small. A session id is drawn anew for every route that is tried, so a message of an
abandoned route can never be mistaken.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from ..engine.request import Sampled, Sampling
from ..errors import BadMessage
from ..transport import Bytes, Frame
from ..units import ModelId, NodeId, SessionId, Slice

CHANNEL = 1  # of the transport's frames
MAX_ROWS = 4096  # sequences in one step: more than any stage will ever batch


class Open(msgspec.Struct, frozen=True, tag=True):
    """Gateway -> stage, once a session: all this stage has to know. Body: prompt ids, then output
    ids.

    Only the first stage is given the ids, and the last one where a repetition penalty needs them.
    `known_tokens` = prompt + output so far: the row that reaches it is the first to be sampled.
    """

    session: SessionId
    model: ModelId
    compute: str
    layers: Slice
    previous: NodeId  # who sends us rows; for the first stage the last one, which sends tokens
    next: NodeId  # whom we send rows; for the last stage the first one
    known_tokens: int
    reserve_tokens: int  # the longest this session can become; its pages are set aside now
    output_tokens: int = 0  # of the known tokens, those that were generated on an earlier route
    sampling: Sampling | None = None  # last stage only
    patience_s: float = 0.0  # how long to queue for pages; 0 = answer at once


class Opened(msgspec.Struct, frozen=True, tag=True):
    session: SessionId


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Stage -> gateway: busy (try later), never (would not fit an empty stage), gone (no such stage
    here), unreachable (next hop).
    """

    session: SessionId
    reason: Literal["busy", "never", "gone", "unreachable"]
    message: str


class RowEntry(msgspec.Struct, frozen=True, array_like=True):
    """`count` positions of one session, from position `start`."""

    session: SessionId
    start: int
    count: int


class Step(msgspec.Struct, frozen=True, tag=True):
    """Stage -> next stage: all that one forward made for it. Body: hidden states (sum of counts,
    width), row-major.
    """

    rows: Annotated[tuple[RowEntry, ...], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]


class TokenEntry(msgspec.Struct, frozen=True, array_like=True):
    session: SessionId
    index: int  # position in the output, from 0
    sampled: Sampled


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Last stage -> first stage (to go on) and gateway (to stream)."""

    entries: Annotated[tuple[TokenEntry, ...], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]


class Close(msgspec.Struct, frozen=True, tag=True):
    """Gateway -> stage: forget the session, free its pages."""

    session: SessionId


class Lost(msgspec.Struct, frozen=True, tag=True):
    """Stage -> gateway: this session cannot go on here. `node` is whom we could not reach, or
    ourselves.
    """

    session: SessionId
    node: NodeId
    message: str


Message = Open | Opened | Refused | Step | Tokens | Close | Lost

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def to_frame(message: Message, body: Bytes = b"") -> Frame:
    return Frame(CHANNEL, _encoder.encode(message), body)


def from_frame(frame: Frame) -> Message:
    """Raises BadMessage: unknown tags and wrong types are refused before our code sees them."""
    try:
        message: Message = _decoder.decode(frame.header)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"a pipeline message does not decode: {error}") from None
    return message


def pack_ids(ids: Sequence[int]) -> bytes:
    words = array.array("I", ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack_ids(body: Bytes) -> tuple[int, ...]:
    if len(body) % 4:
        raise BadMessage(f"{len(body)} bytes are not a list of 32-bit token ids")
    words = array.array("I", bytes(body))
    if sys.byteorder == "big":
        words.byteswap()
    return tuple(words)
