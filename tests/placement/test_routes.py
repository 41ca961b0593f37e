from __future__ import annotations

from random import Random
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import NoRoute
from shoal.placement import Held, Route, cheapest_route
from shoal.units import NodeId, Slice

from .pools import AMBER, BIRCH, CEDAR, DELTA, chains, stage

GATEWAY = NodeId("gateway")


def near(a: NodeId, b: NodeId) -> float:
    return 0.001


def route(held: list[Held], **wishes: object) -> Route:
    asked: dict[str, object] = {"latency": near, "gateway": GATEWAY, "need_tokens": 100, **wishes}
    return cheapest_route(8, held, **asked)  # type: ignore[arg-type]


def nodes(found: Route) -> list[NodeId]:
    return [node for node, _ in found.hops]


def test_whole_slices_are_laid_end_to_end() -> None:
    found = route([stage(BIRCH, 4, 8), stage(AMBER, 0, 4)])
    assert found.hops == ((AMBER, Slice(0, 4)), (BIRCH, Slice(4, 8)))
    assert found.compute == "f32"
    assert found.seconds_per_token == pytest.approx(8 * 0.001 + 2 * 0.001)


def test_one_node_that_holds_all_needs_no_hop() -> None:
    found = route([stage(AMBER, 0, 8, overhead=0.5)])
    assert found.seconds_per_token == pytest.approx(0.508)


def test_a_queue_makes_a_quick_node_slow() -> None:
    busy, idle = stage(AMBER, 0, 8, queue=3), stage(BIRCH, 0, 8, seconds=0.002)
    assert nodes(route([busy, idle])) == [BIRCH]
    assert nodes(route([stage(AMBER, 0, 8, queue=0), idle])) == [AMBER]


def test_the_way_back_to_the_head_is_part_of_the_ring() -> None:
    def one_way(a: NodeId, b: NodeId) -> float:
        return {(AMBER, BIRCH): 0.001, (BIRCH, AMBER): 0.9}.get((a, b), 0.01)

    held = [stage(AMBER, 0, 4), stage(BIRCH, 4, 8), stage(CEDAR, 4, 8)]
    assert nodes(route(held, latency=one_way)) == [AMBER, CEDAR]


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
    assert nodes(route(held, compute="f32")) == [DELTA]


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
        ([stage(AMBER, 0, 5), stage(BIRCH, 3, 8)], "do not meet end to end", "--layers"),
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


@st.composite
def meshes(draw: st.DrawFn) -> tuple[int, list[Held], dict[tuple[NodeId, NodeId], float]]:
    layers = draw(st.integers(1, 3))
    count = draw(st.integers(1, 8))
    names = [NodeId(f"n{i}") for i in range(count)]
    times = st.integers(0, 3).map(float)  # whole numbers: sums are exact, ties are many
    held = []
    for name in names:
        start = draw(st.integers(0, layers - 1))
        stop = draw(st.integers(start + 1, layers))
        held.append(
            stage(
                name,
                start,
                stop,
                seconds=draw(times),
                overhead=draw(times),
                queue=draw(st.integers(0, 2)),
                free=draw(st.sampled_from([50, 150])),
                compute=draw(st.sampled_from(["f32", "f32", "int8"])),
                state=draw(st.sampled_from(["serving", "serving", "serving", "joining"])),
            )
        )
    everyone = [*names, GATEWAY]
    hops = {(a, b): draw(times) for a in everyone for b in everyone if a != b}
    return layers, held, hops


@given(meshes(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_the_route_is_the_one_that_trying_all_of_them_finds(
    mesh: tuple[int, list[Held], dict[tuple[NodeId, NodeId], float]], random: Random
) -> None:
    layers, held, hops = mesh

    def latency(a: NodeId, b: NodeId) -> float:
        return hops.get((a, b), 0.0)

    def cost(ring: tuple[Held, ...]) -> tuple[object, ...]:
        around = zip(ring, (*ring[1:], ring[0]), strict=True)
        return (
            sum(one.free_tokens < 100 for one in ring),
            sum(one.step_seconds for one in ring)
            + sum(latency(one.node, following.node) for one, following in around),
            latency(GATEWAY, ring[0].node) + latency(ring[-1].node, GATEWAY),
            tuple(one.node for one in ring),
        )

    serving = [one for one in held if one.state == "serving"]
    rings = [
        ring
        for compute in ("f32", "int8")
        for ring in chains([one for one in serving if one.compute == compute], layers)
    ]
    random.shuffle(held)
    if not rings:
        with pytest.raises(NoRoute):
            cheapest_route(layers, held, latency, GATEWAY, 100)
        return
    found = cheapest_route(layers, held, latency, GATEWAY, 100)
    assert cost(found.stages) == min(map(cost, rings))
    assert found.seconds_per_token == cost(found.stages)[1]


def test_a_route_among_tens_of_nodes_is_found_at_once() -> None:
    held = [
        stage(NodeId(f"n{i:02}"), 8 * (i % 4), 8 * (i % 4) + 8, seconds=0.001 + i / 1e6)
        for i in range(24)
    ]
    started = perf_counter()
    cheapest_route(32, held, near, GATEWAY, 100)
    assert perf_counter() - started < 0.1
