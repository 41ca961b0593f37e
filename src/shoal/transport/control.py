"""What two transports say to each other on channel 0."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..errors import BadMessage
from .frames import CONTROL, Frame


class Beat(msgspec.Struct, frozen=True, tag=True):
    """I am alive and have nothing else to say."""


class Ping(msgspec.Struct, frozen=True, tag=True):
    """How far away are you?"""

    stamp: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]  # means nothing to whom it is sent


class Pong(msgspec.Struct, frozen=True, tag=True):
    """At once, with the stamp of the ping."""

    stamp: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """From the node that was dialled: this link may be used."""


class Confirm(msgspec.Struct, frozen=True, tag=True):
    """From the node that dialled: it is the one I use from now on."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """I am leaving on purpose."""

    reason: Annotated[str, msgspec.Meta(max_length=200)]


class Enough(msgspec.Struct, frozen=True, tag=True):
    """This link carried nothing, and I have no more use for it. I am not leaving."""


Control = Beat | Ping | Pong | Welcome | Confirm | Goodbye | Enough

_decoder = msgspec.msgpack.Decoder(Control)


def control_frame(message: Control) -> Frame:
    return Frame(CONTROL, msgspec.msgpack.encode(message))


def decode_control(frame: Frame) -> Control:
    """Raises BadMessage."""
    try:
        message: Control = _decoder.decode(frame.header)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"a control message that does not decode: {error}") from None
    return message
