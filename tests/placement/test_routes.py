from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from random import Random
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import NoRoute
from shoal.hardware import Speed
from shoal.placement import Held, Network, Route, Trip, Work, cheapest_route, route_seconds
from shoal.placement.routes import SPREAD
from shoal.units import NodeId, Slice

from .pools import AMBER, BIRCH, CEDAR, DELTA, Ring, rings, stage

Latency = Callable[[NodeId, NodeId], float]
GATEWAY = NodeId("gateway")


def near(a: NodeId, b: NodeId) -> float:
    return 0.001


def route(held: list[Held], *, latency: Latency = near, layers: int = 8, **wishes: Any) -> Route:
    trip = Trip(layers, GATEWAY, **{"need_tokens": 100, **wishes})
    return cheapest_route(trip, held, Network(latency))


def nodes(found: Route) -> list[NodeId]:
    return [node for node, _ in found.hops]


def test_whole_slices_are_laid_end_to_end() -> None:
    found = route([stage(BIRCH, 4, 8), stage(AMBER, 0, 4)])
    assert found.hops == ((AMBER, Slice(0, 4)), (BIRCH, Slice(4, 8)))
    assert found.compute == "f32"
    assert found.seconds == pytest.approx(8 * 0.001 + 2 * 0.001 + 2 * 0.001)  # the ends as well


def test_one_node_that_holds_all_needs_no_hop() -> None:
    found = route([stage(AMBER, 0, 8, overhead=0.5)])
    assert found.seconds == pytest.approx(0.508 + 2 * 0.001)


def test_a_queue_makes_a_quick_node_slow() -> None:
    busy, idle = stage(AMBER, 0, 8, queue=3), stage(BIRCH, 0, 8, seconds=0.002)
    assert nodes(route([busy, idle])) == [BIRCH]
    assert nodes(route([stage(AMBER, 0, 8, queue=0), idle])) == [AMBER]


def test_the_way_back_to_the_head_is_part_of_the_ring() -> None:
    def one_way(a: NodeId, b: NodeId) -> float:
        return {(AMBER, BIRCH): 0.001, (BIRCH, AMBER): 0.9}.get((a, b), 0.01)

    held = [stage(AMBER, 0, 4), stage(BIRCH, 4, 8), stage(CEDAR, 4, 8)]
    assert nodes(route(held, latency=one_way)) == [AMBER, CEDAR]


def test_a_node_is_left_early_and_entered_late_where_that_saves_time() -> None:
    held = [stage(AMBER, 0, 6, seconds=0.01), stage(BIRCH, 2, 8, seconds=0.001)]
    assert route(held).parts == (Slice(0, 2), Slice(2, 8))
    held = [stage(AMBER, 0, 6, seconds=0.001), stage(BIRCH, 2, 8, seconds=0.01)]
    assert route(held).parts == (Slice(0, 6), Slice(6, 8))


def test_an_engine_of_another_make_runs_all_of_its_layers_or_none() -> None:
    held = [stage(AMBER, 0, 6, whole=True), stage(BIRCH, 2, 8)]
    assert route(held).parts == (Slice(0, 6), Slice(6, 8))
    with pytest.raises(NoRoute, match="do not meet end to end"):
        route([stage(AMBER, 0, 6, whole=True), stage(BIRCH, 2, 8, whole=True)])


def test_a_node_is_not_come_back_to() -> None:
    held = [stage(AMBER, 0, 8, seconds=0.01), stage(BIRCH, 3, 5, seconds=0.0001)]
    hops: list[float] = [0.0, 1.0]
    for hop in hops:
        found = route(held, latency=lambda a, b, hop=hop: hop)
        assert len(set(nodes(found))) == len(nodes(found))
        assert nodes(found) == [AMBER]


def test_stations_that_stay_are_left_as_they_are() -> None:
    keep = ((AMBER, Slice(0, 3)), (CEDAR, Slice(6, 8)))
    held = [stage(AMBER, 0, 8), stage(BIRCH, 2, 7), stage(CEDAR, 4, 8), stage(DELTA, 3, 6)]
    found = route(held, keep=keep)
    assert found.hops[0] == keep[0]
    assert found.hops[-1] == keep[1]
    assert found.parts[1] == Slice(3, 6)
    assert nodes(route(held, keep=keep, avoid=frozenset({DELTA}))) == [AMBER, BIRCH, CEDAR]
    with pytest.raises(NoRoute, match="layers 3–5"):
        route(held, keep=keep, avoid=frozenset({BIRCH, DELTA}))


def test_a_station_that_stays_need_not_be_announced_any_more() -> None:
    leaving = stage(AMBER, 0, 4, state="draining")
    for held in ([stage(BIRCH, 4, 8)], [leaving, stage(BIRCH, 4, 8)]):
        found = route(held, keep=((AMBER, Slice(0, 4)),), compute="f32")
        assert nodes(found) == [AMBER, BIRCH]


def test_a_longer_answer_is_worth_a_longer_way_to_a_quicker_ring() -> None:
    def distance(a: NodeId, b: NodeId) -> float:
        return 0.0 if AMBER in (a, b) else 0.05

    held = [stage(AMBER, 0, 8, seconds=0.002), stage(BIRCH, 0, 8, seconds=0.001)]
    assert nodes(route(held, latency=distance, work=Work(tokens=2))) == [AMBER]
    assert nodes(route(held, latency=distance, work=Work(tokens=200))) == [BIRCH]


def test_who_runs_many_sessions_is_slower_by_what_each_of_them_takes() -> None:
    speed = Speed(layer_s=0.001, token_s=0.001)
    held = [
        Held(AMBER, Slice(0, 8), "serving", "f32", speed, 4, 0, 1000),
        Held(BIRCH, Slice(0, 8), "serving", "f32", speed, 3, 0, 1000),
    ]
    assert nodes(route(held)) == [BIRCH]


def test_the_others_delay_counts_as_much_as_is_said() -> None:
    """A node with much to gain from sharing steps, and one that each session makes slower."""
    flat, steep = Speed(layer_s=0.004), Speed(token_s=0.0009)
    held = [
        Held(AMBER, Slice(0, 8), "serving", "f32", flat, 3, 0, 1000),
        Held(BIRCH, Slice(0, 8), "serving", "f32", steep, 3, 0, 1000),
    ]
    assert nodes(route(held, work=Work(others=0.0))) == [BIRCH]
    assert nodes(route(held, work=Work(others=1.0))) == [AMBER]


def test_large_hidden_states_take_the_wider_way() -> None:
    def width(a: NodeId, b: NodeId) -> float:
        return 1e6 if BIRCH in (a, b) else 1e9

    held = [stage(AMBER, 0, 4), stage(BIRCH, 4, 8), stage(CEDAR, 4, 8, seconds=0.002)]
    trip = Trip(8, GATEWAY, work=Work(prompt=500, tokens=1))
    assert nodes(cheapest_route(trip, held, Network(near, width, 16384))) == [AMBER, CEDAR]
    assert nodes(cheapest_route(trip, held, Network(near))) == [AMBER, BIRCH]


def test_among_equal_rings_the_one_near_the_gateway_is_taken() -> None:
    def distance(a: NodeId, b: NodeId) -> float:
        return 0.001 if BIRCH in (a, b) else 0.005

    held = [stage(AMBER, 0, 8), stage(BIRCH, 0, 8)]
    assert nodes(route(held, latency=distance)) == [BIRCH]


def test_a_stage_without_room_for_the_session_is_the_last_resort() -> None:
    full, slow = stage(AMBER, 0, 8, free=99), stage(BIRCH, 0, 8, seconds=9.0)
    assert nodes(route([full, slow])) == [BIRCH]
    assert nodes(route([full])) == [AMBER]
    tail = [stage(BIRCH, 4, 8, free=99), stage(CEDAR, 4, 8, seconds=9.0)]
    assert nodes(route([stage(AMBER, 0, 4), *tail])) == [AMBER, CEDAR]


def test_stages_that_load_or_drain_take_no_new_sessions() -> None:
    held = [stage(AMBER, 0, 8, state="joining"), stage(BIRCH, 0, 8, state="draining")]
    with pytest.raises(NoRoute):
        route(held)
    assert nodes(route([*held, stage(CEDAR, 0, 8, seconds=9.0)])) == [CEDAR]


def test_nodes_to_avoid_are_avoided() -> None:
    held = [stage(AMBER, 0, 8), stage(BIRCH, 0, 8, seconds=9.0)]
    assert nodes(route(held, avoid=frozenset({AMBER}))) == [BIRCH]


def test_all_stages_are_of_one_compute_class() -> None:
    held = [
        stage(AMBER, 0, 4, compute="int8"),
        stage(BIRCH, 4, 8, compute="f32"),
        stage(CEDAR, 4, 8, compute="int8", seconds=9.0),
        stage(DELTA, 0, 8, compute="f32", seconds=99.0),
    ]
    assert nodes(route(held)) == [AMBER, CEDAR]
    assert nodes(route(held, compute="f32")) == [DELTA, BIRCH]


@pytest.mark.parametrize(
    ("held", "says", "tries"),
    [
        ([], "nobody holds layers 0–7", "shoal up --model shoal-tiny"),
        ([stage(AMBER, 0, 3), stage(BIRCH, 6, 8)], "nobody holds layers 3–5", "shoal up"),
        ([stage(AMBER, 0, 3), stage(BIRCH, 4, 8)], "nobody holds layer 3", "shoal up"),
        (
            [stage(AMBER, 1, 3), stage(BIRCH, 4, 8)],
            "nobody holds layers 0, 3",
            "shoal up",
        ),
        (
            [stage(AMBER, 0, 3), stage(BIRCH, 3, 8, state="joining")],
            "layers 3–7 still loading",
            "again",
        ),
        (
            [stage(AMBER, 0, 5, whole=True), stage(BIRCH, 3, 8, whole=True)],
            "do not meet end to end",
            "--layers",
        ),
        (
            [stage(AMBER, 0, 4), stage(BIRCH, 4, 8, compute="int8")],
            "different compute classes",
            "--quant",
        ),
    ],
)
def test_no_route_says_what_is_missing_and_what_to_do(
    held: list[Held], says: str, tries: str
) -> None:
    with pytest.raises(NoRoute) as refusal:
        route(held, model="shoal-tiny")
    assert says in refusal.value.message
    assert "shoal-tiny" in refusal.value.message
    assert tries in refusal.value.hint


def test_a_slice_beyond_the_model_is_no_part_of_any_route() -> None:
    assert nodes(route([stage(AMBER, 0, 9), stage(BIRCH, 0, 8)])) == [BIRCH]


Mesh = tuple[int, list[Held], dict[tuple[NodeId, NodeId], float]]


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    layers = draw(st.integers(1, 5))
    names = [NodeId(f"n{i}") for i in range(draw(st.integers(1, 4)))]
    times = st.integers(0, 3).map(float)  # whole numbers: sums are exact, ties are many
    held = []
    for name in names:
        start = draw(st.integers(0, layers - 1))
        held.append(
            stage(
                name,
                start,
                draw(st.integers(start + 1, layers)),
                seconds=draw(times),
                overhead=draw(times),
                sample=draw(times),
                queue=draw(st.integers(0, 2)),
                free=draw(st.sampled_from([50, 150])),
                compute=draw(st.sampled_from(["f32", "f32", "int8"])),
                state=draw(st.sampled_from(["serving", "serving", "serving", "joining"])),
                whole=draw(st.sampled_from([False, False, True])),
            )
        )
    everyone = [*names, GATEWAY]
    hops = {(a, b): draw(times) for a in everyone for b in everyone if a != b}
    return layers, held, shortest(everyone, hops)


def shortest(
    nodes: list[NodeId], hops: dict[tuple[NodeId, NodeId], float]
) -> dict[tuple[NodeId, NodeId], float]:
    """No way over a third node is shorter: a message would take it."""
    for over, a, b in product(nodes, nodes, nodes):
        if len({over, a, b}) == 3:
            hops[a, b] = min(hops[a, b], hops[a, over] + hops[over, b])
    return hops


@given(meshes(), st.randoms(use_true_random=False), st.data())
@settings(max_examples=150, deadline=None)
def test_the_route_is_the_one_that_trying_all_of_them_finds(
    mesh: Mesh, random: Random, data: st.DataObject
) -> None:
    layers, held, hops = mesh
    trip = Trip(layers, GATEWAY, 100, Work(tokens=data.draw(st.integers(1, 3))))
    network = Network(lambda a, b: hops[a, b])
    serving = [one for one in held if one.state == "serving"]
    possible = [
        ring
        for compute in ("f32", "int8")
        for ring in rings([one for one in serving if one.compute == compute], layers)
    ]
    keep: Ring = ()
    if possible and data.draw(st.booleans()):
        some = data.draw(st.sampled_from(possible))
        keep = tuple(each for each in some if data.draw(st.booleans()))
        kept = tuple((one.node, part) for one, part in keep)
        trip = replace(trip, keep=kept, compute=some[0][0].compute)
        right = [ring for ring in possible if ring[0][0].compute == trip.compute]
        possible = [ring for ring in right if set(keep) <= set(ring)]

    def cost(ring: Ring) -> tuple[int, float]:
        stages = [one for one, _ in ring]
        short = sum(one.free_tokens < 100 for one in stages if one.node not in dict(trip.keep))
        return short, route_seconds(trip, stages, [part for _, part in ring], network)

    random.shuffle(held)
    if not possible:
        with pytest.raises(NoRoute):
            cheapest_route(trip, held, network)
        return
    found = cheapest_route(trip, held, network)
    ring = tuple(zip(found.stages, found.parts, strict=True))
    assert ring in possible
    assert cost(ring) == min(map(cost, possible))
    assert found.seconds == cost(ring)[1]


def test_chance_takes_any_of_the_routes_that_are_nearly_as_good_and_no_other() -> None:
    held = [stage(NodeId(f"n{i}"), 0, 8, seconds=0.001 * (1 + i / 50)) for i in range(10)]
    trip, network, chance = Trip(8, GATEWAY), Network(lambda a, b: 0.0), Random(1)
    found = [cheapest_route(trip, held, network, chance) for _ in range(300)]
    best = min(route.seconds for route in found)
    assert max(route.seconds for route in found) <= (1 + SPREAD) * best
    assert {node for route in found for node in nodes(route)} == {"n0", "n1", "n2"}


@pytest.mark.parametrize(("count", "limit_s"), [(100, 0.1), (256, 0.5)])
def test_a_route_among_hundreds_of_nodes_is_found_at_once(count: int, limit_s: float) -> None:
    """The limits are ten times what it takes on a quiet machine."""
    chance = Random(2)
    held = []
    for place in range(count):
        start = 8 * chance.randrange(9)
        speed = chance.uniform(0.001, 0.01)
        held.append(stage(NodeId(f"n{place:03}"), start, start + 8, seconds=speed))
    network, trip = Network(near), Trip(80, GATEWAY)
    held.append(stage(NodeId("last"), 70, 80))
    cheapest_route(trip, held, network)
    started = perf_counter()
    cheapest_route(trip, held, network)
    assert perf_counter() - started < limit_s
