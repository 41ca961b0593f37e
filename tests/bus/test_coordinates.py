"""Nodes that measure a few ways find places that tell the others."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bus.coordinates import MAX_SECONDS, MAX_STEP_S, Coordinates

# One way, ms, between five regions: round figures of what public clouds publish.
REGIONS = (
    (0.4, 35, 45, 75, 110),
    (35, 0.4, 70, 50, 90),
    (45, 70, 0.4, 110, 80),
    (75, 50, 110, 0.4, 55),
    (110, 90, 80, 55, 0.4),
)
finite = st.floats(-MAX_SECONDS, MAX_SECONDS)
places = st.builds(
    Coordinates, st.tuples(finite, finite, finite), st.floats(0, 1), st.floats(0, MAX_SECONDS)
)


class Network:
    """Nodes spread over the regions, each with a way into the network of its own."""

    def __init__(self, count: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.access = [self.chance.uniform(0.0002, 0.008) for _ in range(count)]
        self.places = [Coordinates() for _ in range(count)]
        self.peers = [self.chance.sample([*range(count)], 9) for _ in range(count)]

    def seconds(self, a: int, b: int) -> float:
        ways = REGIONS[a % len(REGIONS)][b % len(REGIONS)] / 1000
        return ways + self.access[a] + self.access[b]

    def converge(self, rounds: int, lies: dict[int, Coordinates] | None = None) -> None:
        """All measure one of their few peers in each round, with up to a fifth of jitter."""
        for turn in range(rounds):
            for me, peers in enumerate(self.peers):
                peer = peers[turn % len(peers)]
                said = (lies or {}).get(peer, self.places[peer])
                if me != peer:
                    seconds = self.seconds(me, peer) * self.chance.uniform(1.0, 1.2)
                    self.places[me] = self.places[me].moved(said, seconds, self.chance)

    def median_error(self, without: int = -1) -> float:
        nodes = [node for node in range(len(self.places)) if node != without]
        return statistics.median(
            abs(self.places[a].seconds_to(self.places[b]) - self.seconds(a, b)) / self.seconds(a, b)
            for a in nodes
            for b in nodes
            if a < b
        )


@pytest.mark.parametrize("seed", range(3))
def test_few_measurements_tell_all_ways_within_a_quarter(seed: int) -> None:
    network = Network(60, seed)
    network.converge(200)
    assert network.median_error() <= 0.25
    assert statistics.median(place.error for place in network.places) < 0.3


def test_a_mesh_on_one_machine_finds_that_all_are_near() -> None:
    chance, places = random.Random(1), [Coordinates() for _ in range(4)]
    for _ in range(100):
        for me in range(4):
            peer = (me + chance.randrange(1, 4)) % 4
            places[me] = places[me].moved(places[peer], chance.uniform(1e-4, 3e-4), chance)
    for a in places:
        for b in places:
            assert a.measured
            assert a.seconds_to(b) < 0.002


def test_one_who_lies_about_its_place_does_not_ruin_the_others() -> None:
    honest, lied_to = Network(60, 5), Network(60, 5)
    honest.converge(200)
    lied_to.converge(200, lies={7: Coordinates((9.0, -9.0, 9.0), 0.0, 0.0)})
    assert lied_to.median_error(without=7) <= max(0.25, 1.5 * honest.median_error(without=7))


@given(places, places, st.floats(0, 20), st.integers(0, 99))
def test_no_measurement_moves_a_node_far_or_out_of_bounds(
    ours: Coordinates, theirs: Coordinates, seconds: float, seed: int
) -> None:
    after = ours.moved(theirs, seconds, random.Random(seed))
    for x, y in zip(ours.at, after.at, strict=True):
        assert abs(x - y) <= MAX_STEP_S * 1.001
    assert after.height >= 0
    assert 0 < after.error <= 1


def test_the_same_chance_gives_the_same_place() -> None:
    def place(seed: int) -> Coordinates:
        return Coordinates().moved(Coordinates(), 0.01, random.Random(seed))

    assert place(1) == place(1)
    assert place(1) != place(2)
