"""The mixture of routes against the linear programme, which knows nothing of routes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.hardware import Speed
from shoal.placement import Held, Network, Work
from shoal.placement.bound import Worker, max_flow
from shoal.placement.flow import FlowSearch, Rotation, all_together, best_flow
from shoal.placement.simplex import Flow, Path
from shoal.units import NodeId, Slice

from .pools import AMBER, BIRCH, CEDAR, rings, stage


def flow(layers: int, held: list[Held], network: Network | None = None) -> Flow:
    return best_flow(layers, held, Work(), network, batch=1)


def optimum(layers: int, held: list[Held]) -> float:
    workers = [Worker(h.node, h.layers, h.speed.layer_s, whole=h.whole) for h in held]
    return max_flow(layers, workers).tokens_per_s


def busy(found: Flow, held: list[Held]) -> dict[NodeId, float]:
    """The share of its time that each node computes in."""
    shares: dict[NodeId, float] = {}
    layer_s = {stage.node: stage.speed.layer_s for stage in held}
    for path in found.paths:
        for node, part in path.parts:
            seconds = path.tokens_per_s * len(part) * layer_s[node]
            shares[node] = shares.get(node, 0.0) + seconds
    return shares


def test_two_equal_chains_carry_twice_as_much_as_one() -> None:
    one = [stage(AMBER, 0, 4, seconds=0.01), stage(BIRCH, 4, 8, seconds=0.01)]
    assert flow(8, one).tokens_per_s == pytest.approx(25)
    both = [*one, stage(CEDAR, 0, 8, seconds=0.005)]
    assert flow(8, both).tokens_per_s == pytest.approx(50)


def test_without_a_route_nothing_flows() -> None:
    assert flow(8, [stage(AMBER, 0, 4)]) == Flow()
    assert flow(8, []) == Flow()


def test_classes_flow_side_by_side_and_never_into_each_other() -> None:
    held = [stage(AMBER, 0, 8), stage(BIRCH, 0, 8, compute="int8"), stage(CEDAR, 0, 4)]
    found = flow(8, held)
    assert {path.compute for path in found.paths} == {"f32", "int8"}
    assert found.tokens_per_s == pytest.approx(250 + 125, rel=0.02)


def test_a_link_binds_where_its_bandwidth_is_known() -> None:
    tails = [stage(BIRCH, 4, 8, whole=True), stage(CEDAR, 4, 8, seconds=0.002, whole=True)]
    held = [stage(AMBER, 0, 4), *tails]
    width = {(AMBER, BIRCH): 1e5}
    network = Network(lambda a, b: 0.0, lambda a, b: width.get((a, b), 1e12), 1000)
    found = flow(8, held, network)
    shares = {path.parts[1][0]: path.tokens_per_s for path in found.paths}
    assert shares[BIRCH] == pytest.approx(100, rel=0.01)
    assert shares[CEDAR] == pytest.approx(125, rel=0.02)


@st.composite
def pools(draw: st.DrawFn) -> tuple[int, list[Held]]:
    layers = draw(st.integers(2, 6))
    held = []
    for n in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, layers - 1))
        stop = draw(st.integers(start + 1, layers))
        seconds = draw(st.sampled_from([0.001, 0.002, 0.005, 0.01]))
        held.append(stage(NodeId(f"n{n}"), start, stop, seconds=seconds))
    return layers, held


@given(pools())
@settings(max_examples=60, deadline=None)
def test_the_mixture_carries_what_trying_all_routes_says(pool: tuple[int, list[Held]]) -> None:
    layers, held = pool
    best, found = over_all_routes(layers, held), flow(layers, held)
    assert best * 0.985 <= found.tokens_per_s <= best * 1.001
    assert found.tokens_per_s <= found.bound * 1.001
    assert all(share <= 1.001 for share in busy(found, held).values())
    assert best <= optimum(layers, held) * 1.001


def over_all_routes(layers: int, held: list[Held]) -> float:
    """The linear programme with a variable for every route that comes to each node once."""
    from scipy.optimize import linprog

    routes = list(rings(held, layers))
    if not routes:
        return 0.0
    takes = [[0.0] * len(routes) for _ in held]
    for column, ring in enumerate(routes):
        for one, part in ring:
            takes[held.index(one)][column] += one.speed.layer_s * len(part)
    found = linprog([-1.0] * len(routes), A_ub=takes, b_ub=[1.0] * len(held), method="highs")
    return float(-found.fun)


def crowd(count: int, seed: int) -> list[Held]:
    chance = Random(seed)
    starts = [72 * n // (count - 1) for n in range(count)]
    return [
        stage(NodeId(f"n{n:03}"), start, start + 8, seconds=chance.uniform(0.001, 0.01))
        for n, start in enumerate(starts)
    ]


def test_a_hundred_overlapping_stages_are_used_to_within_a_few_percent() -> None:
    held = crowd(100, 3)
    started = perf_counter()
    found = flow(80, held)
    assert perf_counter() - started < 5
    assert found.tokens_per_s >= 0.95 * optimum(80, held)


def test_what_is_found_in_strides_is_found_at_once_and_is_of_use_on_the_way() -> None:
    held, seen = crowd(24, 5), []
    search = FlowSearch(80, held, Work(), batch=1)
    while not search.done:
        search.advance(4)
        seen.append(search.flow().tokens_per_s)
        assert all(share <= 1.001 for share in busy(search.flow(), held).values())
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == pytest.approx(flow(80, held).tokens_per_s, rel=0.02)


def test_equal_slices_may_be_taken_together() -> None:
    held = [stage(NodeId(f"a{n}"), 0, 4, seconds=0.001 * (n + 1)) for n in range(5)]
    held += [stage(NodeId(f"b{n}"), 2, 8, seconds=0.001 * (n + 1)) for n in range(5)]
    together = all_together(8, held, Work(), batch=1)
    assert together == pytest.approx(flow(8, held).tokens_per_s, rel=0.02)


def test_prompts_take_their_share_of_the_time() -> None:
    speed = Speed(layer_s=0.01, token_s=0.001)
    held = [Held(AMBER, Slice(0, 10), "serving", "f32", speed, 0, 0, 1000)]
    short = best_flow(10, held, Work(prompt=0, tokens=10), batch=10)
    long = best_flow(10, held, Work(prompt=30, tokens=10), batch=10)
    assert short.tokens_per_s == pytest.approx(1 / (10 * (0.001 + 0.001)))
    assert long.tokens_per_s == pytest.approx(1 / (10 * (0.001 + 0.001 + 3 * 0.001)))


def test_turns_are_taken_in_proportion_and_never_in_bursts() -> None:
    paths = [Path(((NodeId(name), Slice(0, 8)),), "f32", rate) for name, rate in RATES.items()]
    rotation = Rotation(paths, Random(4))
    turns = [rotation.next(lambda path: True) for _ in range(1000)]
    counts = Counter(path.parts[0][0] for path in turns if path)
    assert counts["quick"] == pytest.approx(600, abs=2)
    assert counts["slow"] == pytest.approx(100, abs=2)
    slow = [n for n, path in enumerate(turns) if path and path.parts[0][0] == "slow"]
    assert max(b - a for a, b in pairwise(slow)) <= 12


RATES = {"quick": 60.0, "middling": 30.0, "slow": 10.0}


def test_who_is_masked_is_made_up_for_by_the_others_in_proportion() -> None:
    paths = [Path(((NodeId(name), Slice(0, 8)),), "f32", rate) for name, rate in RATES.items()]
    rotation = Rotation(paths, Random(4))
    turns = [rotation.next(lambda path: path.tokens_per_s < 60) for _ in range(400)]
    counts = Counter(path.parts[0][0] for path in turns if path)
    assert counts["middling"] == pytest.approx(300, abs=2)
    assert rotation.next(lambda path: False) is None
