"""Which model a node should serve, when there are several.

A model that is served comes before a wish for another one. Who is free goes where the most is
missing; who serves a model leaves it only when that has more than is asked of it, and all its
layers, without this node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from ..units import ModelId, NodeId
from .capacity import Capacities
from .coverage import coverable, covered
from .model import Member, Pool, Wanted
from .rates import tokens_per_s

WANTING = 0.75  # of the demand is served: below it others are called
NO_ROOM = Capacities(0, 0, 0, 0)
MAX_FREE = 256  # free nodes whose choices are followed one by one


@dataclass
class _Supply:
    """What is there of one model: work in layers times tokens/s, spread over its layers."""

    wanted: Wanted
    members: Sequence[Member]
    joined: list[Member] = field(default_factory=list)
    work: float = 0.0

    @property
    def holders(self) -> list[Member]:
        return [one for one in self.members if one.layers is not None]

    @property
    def covered(self) -> bool:
        parts = [one.layers for one in self.members if one.layers is not None]
        return covered(self.wanted.shape.layers, parts, whole=self.wanted.whole)

    @property
    def tokens_per_s(self) -> float:
        return self.work / self.wanted.shape.layers

    @property
    def wanting(self) -> bool:
        return self.tokens_per_s < WANTING * self.wanted.demand

    def work_of(self, member: Member) -> float:
        most = len(member.layers) if member.layers else max(1, member.capacities.middle)
        return most * tokens_per_s(self.wanted.shape, member, most)


def chosen_model(me: NodeId, pool: Pool) -> tuple[Wanted | None, str]:
    """The model that `me` should serve, and why; None when it fits nowhere."""
    supplies = [_Supply(wanted, pool.members[wanted.model]) for wanted in pool.wanted]
    mine = {
        supply.wanted.model: member
        for supply in supplies
        for member in supply.members
        if member.node == me
    }
    if not mine:
        return None, ""
    if len(mine) == 1:
        return next(s.wanted for s in supplies if s.wanted.model in mine), ""
    for supply in supplies:
        supply.work = sum(supply.work_of(one) for one in supply.holders)
    held = next((s for s in supplies if (m := mine.get(s.wanted.model)) and m.layers), None)
    if held is None:
        return _for_a_free_node(me, supplies)
    return _for_a_holder(me, held, supplies)


def _for_a_free_node(me: NodeId, supplies: list[_Supply]) -> tuple[Wanted, str]:
    """Those who are free go one after the other to where the most is missing."""
    able: dict[NodeId, list[tuple[_Supply, Member]]] = {}
    for supply in supplies:
        for one in supply.members:
            if one.layers is None and one.elsewhere is None and one.capacities != NO_ROOM:
                able.setdefault(one.node, []).append((supply, one))
    order = sorted(able, key=_rank)
    if me not in able:
        return next(s.wanted for s in supplies if any(m.node == me for m in s.members)), ""
    open_holes = {s.wanted.model for s in supplies if s.holders and not s.covered}
    for node in [*order[:MAX_FREE], me]:
        supply, member = min(
            able[node], key=lambda pair: _need(pair[0], open_holes, supplies.index(pair[0]))
        )
        if node == me:
            break
        supply.work += supply.work_of(member)
        supply.joined.append(member)
        rooms = [one.capacities for one in (*supply.holders, *supply.joined)]
        if coverable(supply.wanted.shape.layers, rooms):
            open_holes.discard(supply.wanted.model)
    return supply.wanted, "the model that lacks the most"


def _need(supply: _Supply, open_holes: set[ModelId], place: int) -> tuple[bool, float, int]:
    """Smallest first: served models with holes, then what serves the least of its demand."""
    asked = max(supply.wanted.demand, 1e-3)
    return supply.wanted.model not in open_holes, supply.tokens_per_s / asked, place


def _for_a_holder(me: NodeId, held: _Supply, supplies: list[_Supply]) -> tuple[Wanted, str]:
    """Stay, unless another model lacks what ours has too much of."""
    mine = next(one for one in held.members if one.node == me)
    if mine.pinned or mine.state == "joining":
        return held.wanted, ""
    for other in sorted(supplies, key=lambda s: (-s.wanted.demand, s.wanted.model)):
        able = {one.node for one in other.members if one.elsewhere is not None}
        if other is held or me not in able or not (other.wanting or _holed(other)):
            continue
        leavers = _spare(held, able)
        if leavers and leavers[0] == me and _would_cover(other, leavers):
            return other.wanted, "another model lacks more"
    return held.wanted, ""


def _holed(supply: _Supply) -> bool:
    return bool(supply.holders) and not supply.covered


def _spare(held: _Supply, able: set[NodeId]) -> list[NodeId]:
    """Who can leave a model, one after the other, without opening a hole or failing its demand."""
    shape, work = held.wanted.shape, held.work
    serving = {
        one.node: one.layers for one in held.holders if one.state == "serving" and one.layers
    }
    by_node = {one.node: one for one in held.holders}
    leavers: list[NodeId] = []
    for node in sorted((n for n in serving if n in able and not by_node[n].pinned), key=_rank):
        rest = [part for other, part in serving.items() if other != node]
        left = work - held.work_of(by_node[node])
        enough = left / shape.layers >= held.wanted.demand
        if enough and covered(shape.layers, rest, whole=held.wanted.whole):
            del serving[node]
            work = left
            leavers.append(node)
    return leavers


def _would_cover(other: _Supply, leavers: list[NodeId]) -> bool:
    rooms = [
        one.capacities for one in other.members if one.elsewhere is None or one.node in leavers
    ]
    return coverable(other.wanted.shape.layers, rooms)


def _rank(node: NodeId) -> bytes:
    return blake2b(node.encode(), digest_size=8).digest()
