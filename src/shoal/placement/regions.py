"""Nodes that are near each other, and which layers each such region should hold.

A hop between regions costs more than a stage's work. So a region that has room for the whole model
holds all of it, and rings stay inside. Others hold one run of layers each: a ring that crosses
from one to the other and back crosses twice, which is the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..units import NodeId, Slice
from .arrange import Item, Laid, arrange
from .capacity import Capacities
from .coverage import coverable
from .model import Member, ModelShape
from .rates import tokens_per_s

NEAR_S = 0.010  # one way, from the middle of a region
MAX_REGIONS = 128  # the largest; places may be made up, and each region costs time
SAMPLE = 64  # members whose speeds stand for a region's


def regions(members: Sequence[Member]) -> list[list[Member]]:
    """Members by their places, in an order that is the same on all nodes. Who has measured no
    distance yet belongs to the largest region.
    """
    known = sorted((one for one in members if one.place.error < 1), key=lambda one: one.node)
    rest = [one for one in members if one.place.error >= 1]
    found = _clusters(known) if known else []
    if not found:
        return [rest] if rest else []
    max(found, key=len).extend(rest)
    return [sorted(region, key=lambda one: one.node) for region in found]


def _clusters(known: list[Member]) -> list[list[Member]]:
    import numpy as np

    points = np.array([one.place.at for one in known])
    sizes: list[int] = []
    middles = np.empty_like(points)
    left = np.ones(len(known), dtype=bool)
    while left.any():
        near = left & (_distances(np, points, points[left.argmax()]) <= NEAR_S)
        near &= _distances(np, points, points[near].mean(axis=0)) <= 2 * NEAR_S
        middle = points[near].mean(axis=0) if near.any() else points[left.argmax()]
        left[left.argmax()] = False
        left &= ~near
        if (_distances(np, middles[: len(sizes)], middle) > NEAR_S).all():
            middles[len(sizes)] = middle
            sizes.append(int(near.sum()))
    largest = sorted(range(len(sizes)), key=lambda k: -sizes[k])[:MAX_REGIONS]
    of = np.argmin([_distances(np, points, middles[k]) for k in sorted(largest)], axis=0)
    groups: list[list[Member]] = [[] for _ in largest]
    for one, at in zip(known, of, strict=True):
        groups[at].append(one)
    return [group for group in groups if group]


def _distances(np: Any, points: Any, middle: Any) -> Any:
    return np.sqrt(((points - middle) ** 2).sum(axis=1))


def territories(shape: ModelShape, found: Sequence[Sequence[Member]]) -> list[Slice]:
    """The layers that each region should hold."""
    whole = Slice(0, shape.layers)
    if len(found) == 1:
        return [whole]
    items = [_as_one(shape, NodeId(f"{k:06}"), region) for k, region in enumerate(found)]
    alone = [coverable(shape.layers, [one.capacities for one in region]) for region in found]
    fixed = [Laid(whole, item.rates[-1]) for item, able in zip(items, alone, strict=True) if able]
    partial = [item for item, able in zip(items, alone, strict=True) if not able]
    laid = arrange(shape.layers, partial, fixed)
    return [
        whole if able or item.node not in laid else laid[item.node].layers
        for item, able in zip(items, alone, strict=True)
    ]


def _as_one(shape: ModelShape, name: NodeId, region: Sequence[Member]) -> Item:
    """A region as if it were one node."""
    rooms = [one.capacities for one in region]
    middle = sum(min(room.middle, shape.layers) for room in rooms)
    first = max((room.embedding - room.middle for room in rooms if room.embedding), default=-middle)
    last = max((room.head - room.middle for room in rooms if room.head), default=-middle)
    layers = shape.layers
    both = layers if coverable(layers, rooms) else 0
    between, embedding, head = (min(max(0, middle + end), layers) for end in (0, first, last))
    sample = [one for one in region if one.capacities.middle][:SAMPLE]
    work = sum(
        tokens_per_s(shape, one, min(one.capacities.middle, shape.layers)) * one.capacities.middle
        for one in sample
    ) * (len(region) / max(1, len(sample)))
    rates = tuple(work / n for n in range(1, shape.layers + 1))
    return Item(name, Capacities(between, embedding, head, both), rates)
