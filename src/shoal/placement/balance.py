"""From a layout that came about one by one to a much better one, in small steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..units import NodeId, Slice
from .arrange import FEW, Item, Laid, Layout, arrange, throughput
from .coverage import covered
from .model import Member, ModelShape
from .rates import rates, tokens_per_s

ENOUGH = 0.75  # of what the best layout known would carry: nobody moves
MAX_GROUP = 128  # nodes; larger groups are even by their number
HORIZON_S = 3600.0  # within which a move has to pay
LOAD_BYTES_PER_S = 1e8  # assumed

Regions = Sequence[tuple[Sequence[Member], Slice]]


def item_of(shape: ModelShape, member: Member) -> Item:
    """The node with what it would give for each number of layers that fit."""
    room = member.capacities
    most = min(shape.layers, max(room.middle, room.embedding, room.head, room.both))
    return Item(member.node, room, rates(shape, member, most))


def laid_of(shape: ModelShape, members: Sequence[Member]) -> list[Laid]:
    """What they hold today."""
    return [
        Laid(one.layers, tokens_per_s(shape, one, len(one.layers)))
        for one in members
        if one.layers is not None and one.layers.stop <= shape.layers
    ]


def next_step(
    shape: ModelShape, group: Sequence[Member], regions: Regions
) -> tuple[NodeId, Slice] | None:
    """Who of the group moves next, and where to; None when all is good enough, or nobody can.

    The layout aimed at depends on who is there, not on what they hold: each step brings the group
    nearer to it, and once near enough it stays. Meanwhile the others of the group serve all layers.
    """
    if not 1 < len(group) <= MAX_GROUP:
        return None
    now = throughput(shape.layers, laid_of(shape, group))
    if now == 0.0:
        return None
    target = _target(shape, regions)
    then = throughput(shape.layers, list(target.values()))
    if now >= ENOUGH * then:
        return None
    goals: dict[NodeId, Slice] = {}
    for region, _ in regions:
        goals |= _shared_out(shape, region, target)
    steps = [
        (shape.moved_bytes(goals[one.node], one.layers), one.node)
        for one in group
        if one.node in goals and one.layers != goals[one.node]
    ]
    load_s = sum(size for size, _ in steps) / LOAD_BYTES_PER_S
    if now * load_s / len(group) > (then - now) * HORIZON_S:
        return None
    serving = {one.node: one.layers for one in group if one.layers and one.state == "serving"}
    for _, node in sorted(steps):
        rest = [part for other, part in serving.items() if other != node]
        if covered(shape.layers, rest):
            return node, goals[node]
    return None


def much_better(
    shape: ModelShape, members: Sequence[Member], regions: Regions, held: dict[NodeId, Slice]
) -> dict[NodeId, Slice] | None:
    """The best layout known, where that would carry much more than `held`."""
    if not 1 < len(members) <= MAX_GROUP:
        return None
    planned = [replace(one, layers=held.get(one.node)) for one in members]
    now = throughput(shape.layers, laid_of(shape, planned))
    target = _target(shape, regions)
    if now >= ENOUGH * throughput(shape.layers, list(target.values())):
        return None
    goals: dict[NodeId, Slice] = {}
    for region, _ in regions:
        goals |= _shared_out(shape, region, target)
    return goals


def _target(shape: ModelShape, regions: Regions) -> Layout:
    target: Layout = {}
    quick = sum(len(region) for region, _ in regions) > FEW
    for region, ground in regions:
        pinned = [one for one in region if one.pinned]
        items = [item_of(shape, one) for one in region if not one.pinned]
        target |= arrange(shape.layers, items, laid_of(shape, pinned), ground, quick=quick)
        for one, laid in zip(pinned, laid_of(shape, pinned), strict=True):
            target[one.node] = laid
    return target


def _shared_out(shape: ModelShape, region: Sequence[Member], target: Layout) -> dict[NodeId, Slice]:
    """Nodes that are alike swap their goals so that most of them stay, and the rest move little."""
    alike: dict[object, list[Member]] = {}
    for one in region:
        if one.node in target and not one.pinned:
            kind = one.capacities, item_of(shape, one).rates
            alike.setdefault(kind, []).append(one)
    goals: dict[NodeId, Slice] = {}
    for members in alike.values():
        slots = [target[one.node].layers for one in members]
        pairs = sorted(
            (shape.moved_bytes(slot, one.layers), one.layers != slot, one.node, k)
            for one in members
            for k, slot in enumerate(slots)
        )
        taken: set[int] = set()
        for _, _, node, k in pairs:
            if node not in goals and k not in taken:
                goals[node] = slots[k]
                taken.add(k)
    return goals
