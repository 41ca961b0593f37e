"""Nodes that do not keep to the protocol: what they send and announce is changed on its way out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal, get_args

from msgspec.structs import replace

from ..bus import Announcement
from ..bus.announcement import MAX_HINTS, Loss
from ..errors import ShoalError
from ..pipeline.messages import CHANNEL, Message, RowEntry, Step, Tokens, from_frame, to_frame
from ..transport import Frame
from ..units import NodeId, Slice
from .node import SimNode

Lie = Literal["garbage", "repeats", "drops", "shifts", "claims", "blames", "wrong"]
LIES: tuple[Lie, ...] = get_args(Lie)
OFTEN = 0.2  # of the frames

Send = Callable[[NodeId, Frame], None]


def make_liar(node: SimNode, lie: Lie, chance: random.Random) -> None:
    """From now on, until it ends."""
    links, bus = node.links, node.bus
    send, announce = links.send, bus.announce

    def send_lies(node: NodeId, frame: Frame) -> None:
        frames = [frame]
        if chance.random() < OFTEN and node != links.node:
            frames = told(lie, frame, chance)
        for each in frames:
            send(node, each)

    async def announce_lies(announcement: Announcement) -> None:
        changed = announced(lie, announcement, node)
        await announce(changed.sign(node.identity))

    links.send = send_lies  # type: ignore[method-assign]
    bus.announce = announce_lies  # type: ignore[method-assign]
    node.membership.changed()


def told(lie: Lie, frame: Frame, chance: random.Random) -> list[Frame]:
    match lie:
        case "garbage":
            return [frame, Frame(CHANNEL, chance.randbytes(40), chance.randbytes(8))]
        case "repeats":
            return [frame, frame]
        case "drops":
            return []
        case "shifts" | "wrong":
            return [changed(lie, frame, chance)]
        case _:
            return [frame]


def changed(lie: Lie, frame: Frame, chance: random.Random) -> Frame:
    """Other positions, or other tokens and hidden states of the same form."""
    try:
        message = from_frame(frame)
    except ShoalError:
        return frame
    body = bytearray(frame.body)
    new: Message = message
    match message:
        case Step(rows) if lie == "shifts":
            new = Step(tuple(_shifted(row, chance) for row in rows))
        case Step() if body:
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        case Tokens(entries) if lie == "shifts":
            step = chance.choice((-1, 1))
            new = Tokens(tuple(replace(e, index=max(0, e.index + step)) for e in entries))
        case Tokens(entries):
            new = Tokens(
                tuple(
                    replace(e, sampled=replace(e.sampled, token=e.sampled.token ^ 1))
                    for e in entries
                )
            )
    return to_frame(new, bytes(body))


def _shifted(row: RowEntry, chance: random.Random) -> RowEntry:
    return replace(row, start=max(0, row.start + chance.choice((-1, 1))))


def announced(lie: Lie, said: Announcement, node: SimNode) -> Announcement:
    """`claims`: to hold all layers; `blames`: that everybody is gone."""
    if lie == "claims" and said.stages:
        first = said.stages[0]
        everything = replace(first, layers=Slice(0, first.total_layers), state="serving")
        return replace(said, stages=(everything,))
    if lie == "blames":
        others = node.membership.view.announcements()[:MAX_HINTS]
        return replace(said, lost=tuple(Loss(each.node, each.sequence) for each in others))
    return said
