"""Which route a gateway takes: what it knows itself, chance, turns, and what is remembered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from shoal.bus import StageOffer
from shoal.hardware import Speed
from shoal.models.catalogue import Catalogue
from shoal.node.loads import LOAD_S, PLANNED_S, Loads
from shoal.node.router import Router
from shoal.node.routing import Chooser, RoutingConfig
from shoal.pipeline import Plan, Stop, Wish
from shoal.pipeline.messages import Load
from shoal.placement.routes import MAX_STAGES
from shoal.units import ModelId, NodeId, Slice
from tests.bus.nodes import STAGE

NAME = "org/strange"  # whose files we lack: the offers say what it is
GATEWAY = NodeId("gateway")
AMBER, BIRCH, CEDAR = NodeId("amber"), NodeId("birch"), NodeId("cedar")
SPEED = Speed(layer_s=0.002, token_s=0.0005)
Offers = dict[NodeId, StageOffer]


def offer(layers: str, **changes: Any) -> StageOffer:
    room = {"free_tokens": 100_000, "total_tokens": 100_000, "speed": SPEED}
    return replace(STAGE, model_name=NAME, layers=Slice.parse(layers), **{**room, **changes})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def router(
    offers: Offers, *, chance: Random | None = None, clock: Clock | None = None, **config: Any
) -> Router:
    def announced() -> Iterator[tuple[NodeId, StageOffer]]:
        yield from offers.items()

    return Router(
        GATEWAY,
        Catalogue(),
        announced,
        frozenset,
        suspects=lambda: config.pop("suspects", frozenset()),
        chooser=Chooser(
            lambda a, b: 0.001, clock or Clock(), chance, RoutingConfig(secret=b"s", **config)
        ),
    )


def nodes(plan: Plan) -> list[NodeId]:
    return [stop.node for stop in plan.stops]


def wish(prompt: Sequence[int] = (), **changes: Any) -> Wish:
    return Wish(NAME, len(prompt) + 200, prompt, **changes)


# ---- what the gateway knows itself


def test_a_session_on_its_way_counts_before_anybody_has_announced_it() -> None:
    found = router({AMBER: offer("0:8"), BIRCH: offer("0:8")})
    assert {nodes(found.plan(wish()))[0] for _ in range(2)} == {AMBER, BIRCH}


def test_a_stage_that_says_it_is_busy_is_believed_before_its_announcement() -> None:
    clock = Clock()
    offers = {AMBER: offer("0:8"), BIRCH: offer("0:8", sessions=3)}
    found = router(offers, clock=clock)
    assert nodes(found.plan(wish())) == [AMBER]
    found.on_load(AMBER, STAGE.model, Load(9, 0, 50_000))
    assert nodes(found.plan(wish())) == [BIRCH]
    found.on_load(BIRCH, STAGE.model, Load(4, 0, 50_000))
    offers[AMBER] = offer("0:8", sessions=1)  # a newer announcement
    assert nodes(found.plan(wish())) == [AMBER]


def test_what_was_said_or_planned_long_ago_is_forgotten() -> None:
    clock = Clock()
    loads, stage = Loads(clock), offer("0:8")
    loads.told(AMBER, STAGE.model, Load(9, 2, 50_000))
    loads.planned([AMBER], STAGE.model, 1000)
    held = loads.held(AMBER, stage)
    assert (held.sessions, held.queue, held.free_tokens) == (10, 2, 50_000 - 1000 - 10_000)
    clock.now = PLANNED_S + 1
    assert loads.held(AMBER, stage).sessions == 9
    clock.now = LOAD_S + 1
    assert loads.held(AMBER, stage).sessions == 0


def test_running_sessions_have_room_to_grow_into() -> None:
    """Above the high-water mark a stage takes nobody who could be taken elsewhere."""
    loads = Loads(Clock())
    full = offer("0:8", free_tokens=10_100, sessions=2)
    assert loads.held(AMBER, full).free_tokens == 100
    assert loads.held(AMBER, replace(full, sessions=0)).free_tokens == 10_100


# ---- which nodes


def test_who_is_said_to_be_lost_is_taken_only_without_another_way() -> None:
    both = {AMBER: offer("0:8"), BIRCH: offer("0:8", speed=Speed(layer_s=1.0))}
    lost = frozenset({AMBER})

    def around(offers: Offers) -> Router:
        found = router(offers)
        return Router(
            GATEWAY,
            Catalogue(),
            lambda: iter(offers.items()),
            frozenset,
            suspects=lambda: lost,
            chooser=found._chooser,
        )

    assert nodes(around(both).plan(wish())) == [BIRCH]
    assert nodes(around({AMBER: both[AMBER]}).plan(wish())) == [AMBER]


def test_only_what_broke_is_planned_anew() -> None:
    offers = {AMBER: offer("0:4"), BIRCH: offer("2:8"), CEDAR: offer("4:8")}
    keep = (Stop(AMBER, Slice(0, 4)),)
    plan = router(offers).plan(wish(keep=keep, avoid=frozenset({CEDAR}), compute="bf16"))
    assert plan.stops == (*keep, Stop(BIRCH, Slice(4, 8)))


def test_a_session_of_an_exact_class_stays_in_it_and_others_need_not() -> None:
    offers = {
        AMBER: offer("0:8", compute="int8", speed=Speed(layer_s=1.0)),
        BIRCH: offer("0:8", compute="bf16"),
    }
    assert nodes(router(offers).plan(wish(compute="int8"))) == [AMBER]
    assert nodes(router(offers).plan(wish(compute="f32"))) == [BIRCH]


# ---- herds


def everybody(count: int) -> Offers:
    """Half of each slice's holders are twice as quick as the others."""
    quick, slow = SPEED, Speed(layer_s=2 * SPEED.layer_s, token_s=2 * SPEED.token_s)
    return {
        NodeId(f"{part}-{n:02}"): offer(part, speed=quick if n % 2 else slow)
        for part in ("0:4", "4:8")
        for n in range(count)
    }


def load_after(
    gateways: int, sessions: int, refresh: int, chance: Random | None
) -> Counter[NodeId]:
    """Sessions on each node when every gateway has a view of its own that is `refresh` sessions of
    the whole mesh old, and only what it planned itself is newer.
    """
    offers = everybody(8)
    own = [router(offers, chance=chance) for _ in range(gateways)]
    running: Counter[NodeId] = Counter()
    for n in range(sessions):
        if n % refresh == 0:
            offers |= {k: replace(o, sessions=running[k]) for k, o in offers.items()}
        running.update(nodes(own[n % gateways].plan(wish())))
    return running


def test_many_gateways_with_stale_views_do_not_crowd_on_one_stage() -> None:
    """Each gateway plans one session by the same view: a herd would choose the same stages."""
    spread = load_after(gateways=96, sessions=96, refresh=96, chance=Random(5))
    herd = load_after(gateways=96, sessions=96, refresh=96, chance=None)
    quick = 96 / 4  # four quick holders of each slice: none is slow enough to be avoided by then
    assert max(herd.values()) == 96
    assert max(spread.values()) <= 1.7 * quick


def test_with_load_sessions_spread_as_the_nodes_can_carry_them() -> None:
    """Twice as quick, about twice as many, though views are dozens of sessions old."""
    running = load_after(gateways=12, sessions=240, refresh=24, chance=Random(6))
    assert len(running) == 16
    for part in ("0:4", "4:8"):
        quick = sum(running[NodeId(f"{part}-{n:02}")] for n in (1, 3, 5, 7))
        assert 0.55 * 240 <= quick <= 0.8 * 240
    share = 240 * 2 / (4 * 2 + 4 * 1)  # of a quick one
    assert max(running.values()) <= 1.4 * share


def test_alone_the_quickest_is_taken_every_time() -> None:
    offers = everybody(4)
    taken = {nodes(router(offers, chance=Random(n)).plan(wish()))[0] for n in range(40)}
    assert taken == {NodeId("0:4-01"), NodeId("0:4-03")}


# ---- throughput


def test_under_throughput_routes_take_turns_by_what_they_carry() -> None:
    offers = everybody(4)
    found = router(offers, chance=Random(7), mode="throughput")
    counts: Counter[NodeId] = Counter()
    for _ in range(120):
        plan = found.plan(wish())
        counts.update(nodes(plan))
        for node in nodes(plan):
            found.on_load(node, STAGE.model, Load(0, 0, 100_000))
    for part in ("0:4", "4:8"):
        for n, share in enumerate((1 / 6, 2 / 6, 1 / 6, 2 / 6)):
            assert counts[NodeId(f"{part}-{n:02}")] == pytest.approx(120 * share, abs=6)


def test_who_is_full_or_has_a_queue_loses_its_turn() -> None:
    offers = everybody(2)
    offers[NodeId("0:4-01")] = replace(offers[NodeId("0:4-01")], queue=2)
    offers[NodeId("4:8-00")] = replace(offers[NodeId("4:8-00")], free_tokens=10)
    found = router(offers, chance=Random(8), mode="throughput")
    taken = {tuple(nodes(found.plan(wish()))) for _ in range(20)}
    assert taken == {("0:4-00", "4:8-01")}


# ---- affinity


def test_a_prompt_goes_where_its_pages_are_and_a_new_one_does_not() -> None:
    """By now the route has a little more to do than the other one: less than the prompt takes."""
    offers = {AMBER: offer("0:8"), BIRCH: offer("0:8")}
    clock = Clock()
    found = router(offers, clock=clock)
    prompt = list(range(1000))
    first = nodes(found.plan(wish(prompt)))
    clock.now = PLANNED_S + 1
    offers[first[0]] = offer("0:8", sessions=1)
    assert nodes(found.plan(wish([*prompt, 7, 8, 9]))) == first
    clock.now += PLANNED_S + 1
    assert nodes(found.plan(wish([9, *prompt]))) != first


def test_a_spared_prompt_is_worth_exactly_the_time_that_it_takes() -> None:
    """The other route is quicker by a known time for the whole answer."""
    prompt = list(range(1601))  # all but the last token are whole pages
    spared = 8 * 1600 * SPEED.token_s
    for longer, stays in ((0.9 * spared, True), (1.1 * spared, False)):
        clock = Clock()
        offers = {AMBER: offer("0:8")}
        found = router(offers, clock=clock, typical_tokens=100)
        found.plan(wish(prompt))
        clock.now = PLANNED_S + 1
        slower = replace(SPEED, step_s=longer / 101)  # a step for the prompt, one for each token
        offers |= {AMBER: offer("0:8", speed=slower), BIRCH: offer("0:8")}
        assert (nodes(found.plan(wish(prompt))) == [AMBER]) is stays


def test_a_route_with_pages_but_without_room_is_not_taken() -> None:
    offers = {AMBER: offer("0:8")}
    found = router(offers)
    prompt = list(range(400))
    found.plan(wish(prompt))
    offers |= {AMBER: offer("0:8", free_tokens=100, total_tokens=1000), BIRCH: offer("0:8")}
    assert nodes(found.plan(wish(prompt))) == [BIRCH]
    offers |= {AMBER: offer("0:8", state="draining")}
    assert nodes(found.plan(wish(prompt))) == [BIRCH]


def test_asking_whether_a_model_is_ready_takes_nobodys_turn() -> None:
    offers = {AMBER: offer("0:8"), BIRCH: offer("0:8")}
    found = router(offers)
    assert all(found.is_ready(NAME) for _ in range(5))
    assert not router({AMBER: offer("0:4")}).is_ready(NAME)
    assert nodes(found.plan(wish())) == [AMBER]


def test_models_do_not_share_what_is_remembered() -> None:
    loads = Loads(Clock())
    loads.planned([AMBER], ModelId("other"), 100)
    assert loads.held(AMBER, offer("0:8")).sessions == 0


def test_who_is_avoided_takes_nobodys_place_among_those_that_are_looked_at() -> None:
    liars = {NodeId(f"liar{n}"): offer("0:8", speed=Speed()) for n in range(MAX_STAGES)}
    found = router({**liars, AMBER: offer("0:8")})
    assert nodes(found.plan(wish(avoid=frozenset(liars)))) == [AMBER]
