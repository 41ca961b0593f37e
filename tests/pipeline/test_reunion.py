"""How long a stream waits for a route that broke."""

from __future__ import annotations

import itertools

from shoal.engine.request import Sampling
from shoal.errors import Relief
from shoal.pipeline.generation import FindRoute, Generation, Plan, Request, Stop, Tell
from shoal.pipeline.messages import Close, Leaving, Opened
from shoal.pipeline.reunion import Reunion, ReunionConfig
from shoal.units import ModelId, NodeId, SessionId, Slice

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
CONFIG = ReunionConfig(moment_s=1.5, grace_s=6, most_s=30)


def waited(*seen: tuple[float, Relief]) -> float:
    """How long a stream waits that sees these from these moments on."""
    reunion, now = Reunion(CONFIG), 0.0
    while True:
        relief = next(relief for at, relief in reversed(seen) if now >= at)
        wait_s = reunion.next_look_s(relief, now)
        if wait_s is None:
            return now
        assert 0 < wait_s <= CONFIG.max_look_s
        now += wait_s


def test_where_nobody_can_help_a_moment_is_enough() -> None:
    assert 1.5 <= waited((0, "none")) < 2


def test_who_could_help_has_time_to_find_out_and_begin() -> None:
    assert 6 <= waited((0, "possible")) < 7


def test_as_long_as_somebody_is_coming_the_stream_waits_up_to_a_limit() -> None:
    assert 30 <= waited((0, "possible"), (4, "coming")) < 31


def test_after_the_last_sign_it_waits_no_longer_than_before_the_first() -> None:
    assert 13 <= waited((0, "possible"), (4, "coming"), (8, "possible")) < 15
    assert 9 <= waited((0, "possible"), (4, "coming"), (8, "none")) < 10


def test_every_route_that_breaks_has_the_whole_patience() -> None:
    reunion = Reunion(CONFIG)
    assert reunion.next_look_s("none", 0.0) is not None
    assert reunion.next_look_s("none", 2.0) is None
    reunion.whole()
    assert reunion.next_look_s("none", 3.0) is not None


def test_who_leaves_while_there_is_no_route_is_not_kept_for_the_next_one() -> None:
    """It may be on its way to hold what is missing, and waits until we have let it go."""
    ids = (SessionId(f"{number:016x}") for number in itertools.count())
    request = Request("toy", (1, 2, 3), Sampling(max_tokens=10))
    generation = Generation(request, lambda: next(ids))
    stops = tuple(Stop(node, Slice(at, at + 1)) for at, node in enumerate((A, B, C)))
    generation.begin()
    generation.route(Plan(ModelId("m"), "int8", stops))
    for node in (B, C, A):
        generation.opened(Opened(session_of(generation)), node)
    assert generation.state == "running"
    out = generation.node_lost(B, "gone")
    (find,) = (each for each in out if isinstance(each, FindRoute))
    assert [stop.node for stop in find.wishes[0].keep] == [A, C]
    before = session_of(generation)
    assert generation.leaving(Leaving(before), A) == [Tell(A, Close(before))]
    (again,) = generation.look_again(frozenset())
    assert isinstance(again, FindRoute)
    assert [stop.node for stop in again.wishes[0].keep] == [C]
    assert A not in again.wishes[0].avoid  # with other layers it is welcome


def session_of(generation: Generation) -> SessionId:
    assert generation.session is not None
    return generation.session
