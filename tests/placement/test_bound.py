"""The linear programme against a slower one over whole routes, and against cases known by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.placement.bound import (
    Bandwidth,
    Handover,
    Mixture,
    Traffic,
    Worker,
    max_flow,
    placement_free,
)
from shoal.units import NodeId, Slice

from .pools import AMBER, BIRCH, CEDAR

pytest.importorskip("scipy")
BYTES = Traffic(bytes=1.0)


def worker(node: NodeId, start: int, stop: int, seconds: float, **more: float) -> Worker:
    return Worker(node, Slice(start, stop), seconds, room=more.get("room"))


def boundless(source: NodeId, target: NodeId) -> float:
    return math.inf


@st.composite
def placements(draw: st.DrawFn, layers: int = 4) -> list[Worker]:
    """Slices of three or four nodes, most often with every layer somewhere."""
    workers = []
    for number in range(draw(st.integers(2, 4))):
        start = draw(st.integers(0, layers - 1)) if number else 0
        stop = draw(st.integers(start + 1, layers))
        whole = draw(st.integers(0, 3)) == 0
        seconds = draw(st.sampled_from([0.1, 0.2, 0.25, 0.7]))
        workers.append(Worker(NodeId(f"n{number}"), Slice(start, stop), seconds, None, whole))
    return workers


def over_routes(layers: int, workers: Sequence[Worker], bandwidth: Bandwidth) -> float:
    """The same bound with a variable for every way to give each layer to a holder of it."""
    from scipy.optimize import linprog

    holders = [[w for w in workers if w.layers.start <= at < w.layers.stop] for at in range(layers)]
    routes = [route for route in product(*holders) if _runs_wholes(route)]
    if not routes:
        return 0.0
    rows = [[w.seconds * route.count(w) for route in routes] for w in workers]
    limits = [1.0] * len(workers)
    for a, b in product(workers, workers):
        if a is not b:
            rows.append([float(list(pairwise(route)).count((a, b))) for route in routes])
            limits.append(bandwidth(a.node, b.node))
    return -float(linprog([-1.0] * len(routes), A_ub=rows, b_ub=limits).fun)


def _runs_wholes(route: Sequence[Worker]) -> bool:
    return all(route.count(one) == len(one.layers) for one in route if one.whole)


@given(placements())
@settings(max_examples=60, deadline=None)
def test_free_links_give_what_a_programme_over_all_routes_gives(workers: list[Worker]) -> None:
    slow = over_routes(4, workers, lambda a, b: 1e6)
    assert max_flow(4, workers).tokens_per_s == pytest.approx(slow, abs=1e-6)
    paired = max_flow(4, workers, boundless, BYTES)
    assert paired.tokens_per_s == pytest.approx(slow, abs=1e-6)


@given(placements(), st.dictionaries(st.integers(0, 15), st.sampled_from([0.1, 0.5, 2.0])))
@settings(max_examples=60, deadline=None)
def test_narrow_links_give_what_a_programme_over_all_routes_gives(
    workers: list[Worker], narrow: dict[int, float]
) -> None:
    def bandwidth(source: NodeId, target: NodeId) -> float:
        return narrow.get(4 * int(source[1:]) + int(target[1:]), 50.0)

    flow = max_flow(4, workers, bandwidth, BYTES)
    assert flow.tokens_per_s == pytest.approx(over_routes(4, workers, bandwidth), abs=1e-6)


@given(placements())
@settings(max_examples=60, deadline=None)
def test_no_placement_beats_the_bound_without_one_and_nobody_works_overtime(
    workers: list[Worker],
) -> None:
    flow = max_flow(4, workers, boundless, BYTES)
    assert flow.tokens_per_s <= placement_free(4, [w.seconds for w in workers]) + 1e-6
    assert all(flow.share(worker) <= 1 + 1e-6 for worker in workers)
    for layer in range(4):
        through = sum(flow.computed.get((worker.node, layer), 0.0) for worker in workers)
        assert through == pytest.approx(flow.tokens_per_s, abs=1e-6)


def test_a_chain_is_as_fast_as_its_slowest_stage() -> None:
    chain = [worker(AMBER, 0, 4, 0.01), worker(BIRCH, 4, 10, 0.02)]
    assert max_flow(10, chain).tokens_per_s == pytest.approx(1 / (6 * 0.02))


def test_replicas_of_a_slice_add_up() -> None:
    pool = [worker(AMBER, 0, 4, 0.01), worker(BIRCH, 4, 8, 0.02), worker(CEDAR, 4, 8, 0.04)]
    assert max_flow(8, pool).tokens_per_s == pytest.approx(1 / 0.08 + 1 / 0.16)


def test_an_overlap_is_split_where_that_helps() -> None:
    """Of six layers the fast one could do four, the slow one four: they share two."""
    pool = [worker(AMBER, 0, 4, 0.1), worker(BIRCH, 2, 6, 0.1)]
    flow = max_flow(6, pool, boundless, BYTES)
    assert flow.tokens_per_s == pytest.approx(1 / 0.3)
    assert Handover(None, AMBER, 0) in flow.handed


def test_what_runs_whole_cannot_be_split() -> None:
    pool = [Worker(AMBER, Slice(0, 4), 0.1, whole=True), worker(BIRCH, 2, 6, 0.1)]
    assert max_flow(6, pool).tokens_per_s == pytest.approx(1 / 0.4)


def test_a_link_carries_no_more_than_its_bandwidth() -> None:
    chain = [worker(AMBER, 0, 2, 0.001), worker(BIRCH, 2, 4, 0.001)]
    flow = max_flow(4, chain, lambda a, b: 16384 * 7.0, Traffic(bytes=16384))
    assert flow.tokens_per_s == pytest.approx(7.0)
    assert flow.handed[Handover(AMBER, BIRCH, 2)] == pytest.approx(7.0)


def test_full_caches_bind_before_computing_does() -> None:
    """Room for 3000 tokens in each of 2 layers, 1000 tokens a request of 10 answered ones for 5 s:
    three requests in 5 s.
    """
    one = worker(AMBER, 0, 2, 0.001, room=6000)
    mixture = Mixture(prompt=995, answer=10)
    flow = max_flow(2, [one], traffic=mixture.traffic(0.0, stay_s=5.0))
    assert flow.tokens_per_s == pytest.approx(3 * 10 / 5)


def test_a_prompt_costs_each_token_of_its_answer_a_share() -> None:
    mixture = Mixture(prompt=750, answer=250)
    assert mixture.seconds(prompt_s=0.5, decode_s=0.001) == pytest.approx(0.003)
    assert mixture.traffic(100).bytes == pytest.approx(400)


def test_a_layer_that_nobody_holds_lets_nothing_through() -> None:
    assert max_flow(3, [worker(AMBER, 0, 2, 0.1)]).tokens_per_s == 0


@pytest.mark.parametrize(
    "pool",
    [
        [worker(AMBER, 0, 2, 0.1), worker(AMBER, 2, 4, 0.1)],
        [worker(AMBER, 0, 5, 0.1)],
        [worker(AMBER, 0, 4, 0.0)],
    ],
)
def test_workers_that_cannot_be_are_refused(pool: list[Worker]) -> None:
    with pytest.raises(ValueError, match=r"layer|worker"):
        max_flow(4, pool)


def test_few_requests_cannot_fill_a_ring() -> None:
    """One at a time takes a step of each stage and the hops; many are bound by what tokens add."""
    chain = [
        Worker(AMBER, Slice(0, 2), 0.001, step_s=0.01),
        Worker(BIRCH, Slice(2, 4), 0.001, step_s=0.01),
    ]

    def with_in_flight(count: float) -> float:
        return max_flow(4, chain, traffic=Traffic(in_flight=count, hops_s=0.1)).tokens_per_s

    alone = 1 / (4 * 0.011 + 0.1)
    assert with_in_flight(1) == pytest.approx(alone, rel=0.05)
    assert with_in_flight(1) >= alone
    assert with_in_flight(2) < 2.01 * with_in_flight(1)
    assert with_in_flight(1e6) == pytest.approx(1 / 0.002, rel=0.05)
    assert with_in_flight(20) == pytest.approx(_closed(20), rel=0.05)
    assert with_in_flight(20) >= _closed(20) - 1e-6


def _closed(in_flight: float) -> float:
    """Tokens/s of two stages of 2 layers with as many in flight, by bisection."""
    low, high = 0.0, 500.0
    for _ in range(60):
        rate = (low + high) / 2
        waits = 2 * rate * 0.02 / (1 - 2 * rate * 0.001) + rate * 0.1
        low, high = (rate, high) if waits < in_flight else (low, rate)
    return low
