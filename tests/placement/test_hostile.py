"""Strangers announce whatever they like: nothing of it may make placing or routing endless."""

from __future__ import annotations

import random
from dataclasses import replace
from time import process_time

import pytest

from shoal.bus.coordinates import Coordinates
from shoal.hardware import Speed
from shoal.placement import Held, Member, Network, Pool, Trip, Wanted, Work, cheapest_route, decide
from shoal.placement.coverage import coverage
from shoal.placement.expect import MAX_PAIRS
from shoal.placement.regions import MAX_REGIONS, regions
from shoal.placement.routes import MAX_STAGES, few_of_each
from shoal.units import ModelId, NodeId, Slice

from .pools import even, roomy, stage

WORK = Work(prompt=100, tokens=256, others=1.0)


def far(a: NodeId, b: NodeId) -> float:
    """Who is called a... is far from all others like it, and near to everybody else."""
    return 10.0 if a[0] == b[0] == "a" else 0.0


def crowd(kind: str, layers: int) -> list[Held]:
    nodes = [NodeId(f"a{n:03}") for n in range(MAX_STAGES)]
    if kind == "all hold everything":
        return [stage(node, 0, layers) for node in nodes]
    if kind == "all begin the model":
        return [stage(node, 0, layers - n % layers) for n, node in enumerate(nodes)]
    half = MAX_STAGES // 2
    free = [(NodeId(f"b{n:03}"), (2 * n + 1) % layers) for n in range(half)]
    bait = [stage(node, at, at + 1, seconds=0.0) for node, at in free]
    return [*(stage(node, 0, layers) for node in nodes[:half]), *bait]


@pytest.mark.parametrize("kind", ["all hold everything", "all begin the model", "baits"])
def test_no_announcements_make_the_search_for_a_route_long(kind: str) -> None:
    held, network = crowd(kind, 100), Network(far)
    network.tables(tuple(one.node for one in held))  # distances are asked for now and then only
    trip = Trip(100, NodeId("gateway"), 100, WORK)
    started = process_time()
    found = cheapest_route(trip, held, network, random.Random(1))
    assert process_time() - started < 5.0  # many times what it takes; it was minutes
    assert [part.start for part in found.parts[1:]] == [part.stop for part in found.parts[:-1]]
    assert len({node for node, _ in found.hops}) == len(found.hops)


def test_distances_of_nodes_without_end_are_not_all_remembered() -> None:
    network = Network(far)
    for n in range(MAX_PAIRS + 10):
        network.pair(NodeId("a"), NodeId(f"b{n}"))
    assert len(network._known) <= MAX_PAIRS


def test_thousands_who_each_say_they_live_elsewhere_are_few_regions() -> None:
    chance, shape = random.Random(0), even(32)

    def somewhere() -> Coordinates:
        x, y, z = (chance.uniform(-10, 10) for _ in range(3))
        return Coordinates((x, y, z), 0.0, 0.1)

    home = Coordinates((0.1, 0.1, 0.1), 0.0, 0.1)
    liars = [Member(NodeId(f"a{n:04}"), roomy(2), place=somewhere()) for n in range(3000)]
    honest = [Member(NodeId(f"z{n}"), roomy(32), place=home) for n in range(4)]
    found = regions([*liars, *honest])
    assert len(found) <= MAX_REGIONS
    assert any(region[-4:] == honest for region in found)
    started = process_time()
    decide(honest[0].node, Pool((Wanted(ModelId("m"), shape),), {ModelId("m"): [*liars, *honest]}))
    assert process_time() - started < 10.0


def test_no_crowd_of_other_slices_hides_those_that_a_route_needs() -> None:
    layers, chance = 40, random.Random(0)
    parts = [Slice(a, b) for a in range(layers) for b in range(a + 1, layers + 1)]
    others = [part for part in parts if not part.start <= 7 < part.stop]
    liars = [
        stage(NodeId(f"liar{n}"), part.start, part.stop, seconds=0.0, free=1 << 40)
        for n, part in enumerate(chance.sample(others, MAX_STAGES + 50))
    ]
    honest = [stage(NodeId(f"n{start}"), start, start + 10) for start in range(0, layers, 10)]
    few = few_of_each([*liars, *honest], 100)
    assert len(few) == MAX_STAGES
    found = cheapest_route(Trip(layers, NodeId("gateway"), 100), few, Network(lambda a, b: 0.01))
    assert honest[0].node in [node for node, _ in found.hops]


@pytest.mark.parametrize("held", [Slice(0, 16), Slice(4, 8)], ids=str)
def test_beside_one_that_says_it_takes_no_time_the_others_still_hold_the_model(held: Slice) -> None:
    honest = [Member(NodeId(f"n{n:02}"), roomy(4), speed=Speed(layer_s=1e-3)) for n in range(16)]
    liar = Member(NodeId("liar"), roomy(16), held, pinned=True, speed=Speed())
    model, shape = ModelId("m"), even(16)
    for n, one in enumerate(honest):
        pool = Pool((Wanted(model, shape),), {model: [*honest, liar]})
        honest[n] = replace(one, layers=decide(one.node, pool).layers)
    parts = [one.layers for one in honest if one.layers]
    assert max(coverage(16, parts)) <= 6  # before, all stood on the first four layers
