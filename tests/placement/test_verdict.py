"""What is said of a mesh: of figures that can be worked out by hand."""

from __future__ import annotations

from math import isfinite
from random import Random

import pytest

from shoal.hardware import Speed
from shoal.placement import Held, Network, Trip
from shoal.placement.verdict import Verdict, if_lost, readable, sentence, verdict
from shoal.units import NodeId, Slice

from .pools import AMBER, BIRCH, CEDAR, DELTA, stage

GATEWAY = NodeId("gateway")


def judged(held: list[Held], layers: int = 16, hop_s: float = 0.005) -> Verdict:
    return verdict(Trip(layers, GATEWAY, model="shoal-tiny"), held, Network(lambda a, b: hop_s))


def test_one_reader_waits_for_every_layer_and_every_hop_and_the_way_back() -> None:
    found = judged([stage(AMBER, 0, 8), stage(BIRCH, 8, 16)])
    assert found.ready
    assert found.one_tokens_per_s == pytest.approx(1 / (16 * 0.001 + 2 * 0.005))


def test_the_first_token_takes_the_prompt_and_the_ways_to_and_from_the_ring() -> None:
    found = judged([stage(AMBER, 0, 8), stage(BIRCH, 8, 16)])
    prompt, step, hops = 16 * 0.001, 16 * 0.001, 3 * 0.005
    assert found.first_token_s == pytest.approx(prompt + step + hops)


def test_all_together_is_what_full_batches_carry() -> None:
    found = judged([stage(AMBER, 0, 8), stage(BIRCH, 8, 16), stage(CEDAR, 8, 16)])
    assert found.all_tokens_per_s == pytest.approx(32 / (8 * 0.001), rel=0.02)


def test_whom_the_mesh_cannot_do_without_is_named_with_what_would_be_gone() -> None:
    held = [stage(AMBER, 0, 8), stage(BIRCH, 4, 16), stage(CEDAR, 0, 6), stage(DELTA, 12, 16)]
    found = judged(held)
    assert [(each.node, each.layers) for each in found.needed] == [(BIRCH, (Slice(8, 12),))]
    assert if_lost(found.needed[0], "birch") == "if birch leaves, layers 8–11 are gone"
    assert (found.holders, found.weakest) == (1, (Slice(8, 12),))


def test_where_everything_is_held_twice_nobody_is_needed() -> None:
    held = [stage(AMBER, 0, 16), stage(BIRCH, 0, 9), stage(CEDAR, 9, 16)]
    found = judged(held)
    assert (found.holders, found.needed) == (2, ())
    assert sentence(found).startswith("weakest layer held by 2; about ")
    assert sentence(found).endswith(" for all together")


def test_without_a_route_the_reason_is_said_and_no_figures() -> None:
    found = judged([stage(AMBER, 0, 8), stage(BIRCH, 10, 16)])
    assert not found.ready
    assert found.missing == (Slice(8, 10),)
    assert sentence(found) == "no route for shoal-tiny: nobody holds layers 8–9"
    assert found.one_tokens_per_s == found.all_tokens_per_s == 0.0


def test_a_slice_beyond_the_model_counts_for_nothing() -> None:
    assert judged([stage(AMBER, 0, 16), stage(BIRCH, 0, 99)]).holders == 1


def test_figures_for_people_have_two_digits() -> None:
    shown = [readable(rate) for rate in (0.123, 9.44, 14.2, 90.4, 1234.0, 98765.0)]
    assert shown == ["0.1", "9.4", "14", "90", "1200", "99000"]


@pytest.mark.parametrize("huge", [1e300, 1.7e308])
def test_figures_beyond_all_measure_spoil_nothing(huge: float) -> None:
    """Strangers may announce any number; who says that it takes for ever is not chosen."""
    speed = Speed(step_s=huge, layer_s=huge, token_s=huge, context_s=huge, sample_s=huge)
    liar = Held(DELTA, Slice(0, 16), "serving", "f32", speed, 1 << 53, 1 << 53, 1 << 53)
    honest = stage(AMBER, 0, 16)
    found = judged([liar, honest])
    assert found.one_tokens_per_s == pytest.approx(1 / 0.016)
    assert found.all_tokens_per_s == pytest.approx(2000, rel=0.02)
    assert 0 < judged([liar]).one_tokens_per_s < 1
    nothing = Held(BIRCH, Slice(0, 16), "serving", "f32", Speed(), 0, 0, 1 << 53)
    assert isfinite(judged([nothing, honest]).all_tokens_per_s)


def test_a_crowd_is_judged_in_a_moment() -> None:
    chance = Random(1)
    crowd = [
        stage(NodeId(f"n{n}"), at, at + 8, seconds=chance.uniform(0.001, 0.01))
        for n in range(2000)
        for at in [8 * chance.randrange(10)]
    ]
    assert judged(crowd, 80).ready
