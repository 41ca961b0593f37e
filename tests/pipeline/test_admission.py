"""Pages as they are needed: when they run out the youngest makes room, and everybody gets there."""

import random

import pytest

from shoal.engine.request import Sampling
from shoal.pipeline.messages import Load, Open, Opened, Preempted, Refused
from shoal.pipeline.stage import Send
from shoal.units import ModelId, NodeId, SessionId, Slice

from .small_mesh import GATEWAY, PAGE, SmallMesh, expected
from .test_sessions import DOUBLE, THREE, assert_all_pages_are_back, run_out

OTHER = NodeId("other gateway")


def test_a_session_holds_pages_for_what_it_needs_and_not_for_what_it_may_become() -> None:
    mesh = SmallMesh(1, THREE, pages=40)
    mesh.ask((1, 2, 3), 100)
    while len(mesh.delivered[0]) < 10:
        mesh.turn()
    for node in mesh.nodes.values():
        held = node.sessions.pool.used_fraction * 40
        assert held <= (13 + 1 + mesh.headroom) / PAGE + 1
    run_out(mesh)
    assert mesh.delivered[0] == expected((1, 2, 3), 100)
    assert mesh.preempted == []


def test_the_youngest_makes_room_and_its_stream_merely_pauses() -> None:
    mesh = SmallMesh(2, THREE, pages=12)
    prompts = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    for prompt in prompts:
        mesh.ask(prompt, 30)
    run_out(mesh)
    assert mesh.delivered == [expected(prompt, 30) for prompt in prompts]
    assert mesh.preempted
    assert 0 not in mesh.preempted
    assert all(not generation.avoid for generation in mesh.generations)
    assert_all_pages_are_back(mesh)


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("block", range(4))
def test_under_any_schedule_everybody_gets_there_and_the_oldest_is_never_sent_away(
    block: int, share_prefixes: bool
) -> None:
    preempted = 0
    for seed in range(block * 12, block * 12 + 12):
        chance = random.Random(seed)
        slices = chance.choice([{"whole": Slice(0, 6)}, THREE, DOUBLE])
        mesh = SmallMesh(
            seed,
            slices,
            pages=chance.choice([8, 10, 14]),
            max_waiting=20,
            headroom=chance.choice([0, 1, 4]),
            share_prefixes=share_prefixes,
        )
        wanted = []
        for _ in range(chance.randint(3, 9)):
            prompt = tuple(chance.randrange(3) for _ in range(chance.randint(1, 11)))
            count = chance.randint(1, 20)
            mesh.ask(prompt, count, chance.choice([GATEWAY, OTHER]))
            wanted.append(expected(prompt, count))
            for _ in range(chance.choice([0, 0, 100])):
                mesh.turn()
        run_out(mesh)
        assert mesh.delivered == wanted, f"seed {seed}"
        mesh.assert_pages_are_counted_right()
        assert_all_pages_are_back(mesh)
        preempted += len(mesh.preempted)
    assert preempted > 0


def test_an_old_one_that_comes_back_goes_before_the_young() -> None:
    mesh = SmallMesh(3, {"whole": Slice(0, 6)}, pages=8)
    for prompt in ((1, 2, 3), (4, 5, 6), (7, 8, 9), (1, 5, 9)):
        mesh.ask(prompt, 20)
    run_out(mesh)
    ended = sorted(range(4), key=lambda index: mesh.generations[index].progress)
    assert len(ended) == 4
    assert mesh.preempted.count(1) <= mesh.preempted.count(3)


@pytest.mark.parametrize(("share", "sent_away"), [(0.5, False), (1.0, True)])
def test_nobody_takes_from_another_gateway_beyond_its_own_share(
    share: float, sent_away: bool
) -> None:
    mesh = SmallMesh(4, {"whole": Slice(0, 6)}, pages=12, gateway_share=share)
    greedy = mesh.ask((1, 2, 3), 40, OTHER)  # older than the other
    while len(mesh.delivered[greedy]) < 6:
        mesh.turn()
    modest = mesh.ask((4, 5, 6), 20)
    run_out(mesh)
    assert (modest in mesh.preempted) == sent_away
    assert mesh.delivered[greedy] == expected((1, 2, 3), 40)
    assert mesh.delivered[modest] == expected((4, 5, 6), 20)


def test_a_stage_that_never_lets_a_session_get_on_is_avoided() -> None:
    mesh = SmallMesh(5, DOUBLE)
    mesh.ask((1, 2, 3), 5)
    generation = mesh.generations[0]
    for _ in range(generation.config.max_preemptions + 1):
        assert generation.session is not None
        assert generation.plan is not None
        bad = generation.plan.stops[0].node
        mesh._gateway(0, generation.preempted(Preempted(generation.session), bad))
    assert generation.avoid == {bad}
    run_out(mesh)
    assert mesh.delivered[0] == expected((1, 2, 3), 5)


def opens(mesh: SmallMesh) -> list[Open]:
    """Those under way."""
    return [item[0] for link in mesh.links.values() for item in link if isinstance(item[0], Open)]


def test_who_is_sent_away_twice_without_a_token_shares_nothing_that_it_might_have_to_replace() -> (
    None
):
    mesh = SmallMesh(7, {"whole": Slice(0, 6)})
    mesh.ask(tuple(range(20)), 5)
    generation = mesh.generations[0]
    for wanted in (16, 0):
        mesh.links.clear()
        assert generation.session is not None
        away = generation.preempted(Preempted(generation.session), NodeId("whole"))
        mesh._gateway(0, away)
        assert [each.prefix_tokens for each in opens(mesh)] == [wanted]
        assert all(each.patience_s > 0 for each in opens(mesh))


def test_who_was_sent_away_queues_again_rather_than_give_up() -> None:
    mesh = SmallMesh(8, {"whole": Slice(0, 6)})
    mesh.ask((1, 2, 3), 5)
    generation, whole = mesh.generations[0], NodeId("whole")
    assert generation.session is not None
    mesh._gateway(0, generation.preempted(Preempted(generation.session), whole))
    for _ in range(3):
        assert generation.session is not None
        mesh._gateway(0, generation.refused(Refused(generation.session, "busy", ""), whole))
    assert generation.avoid == frozenset()
    run_out(mesh)
    assert mesh.delivered[0] == expected((1, 2, 3), 5)


def test_when_the_one_in_front_gives_up_those_behind_it_get_on() -> None:
    mesh = SmallMesh(9, {"whole": Slice(0, 6)}, pages=8)
    sessions, whole = mesh.nodes[NodeId("whole")].sessions, NodeId("whole")
    told: list[object] = []
    for born, (known, patience) in enumerate([(20, 0.0), (24, 5.0), (4, 60.0)]):
        session = SessionId(f"s{born}")
        message = Open(
            session, ModelId("toy"), "f32", Slice(0, 6), whole, whole, known, known,
            sampling=Sampling(), patience_s=patience, born=born,
        )  # fmt: skip
        sessions.open(message, (1,) * known, GATEWAY, 0.0)
        told += sessions.connected(session, 0.0)
    opened = [each.message for each in told if isinstance(each, Send)]
    assert opened == [Opened(SessionId("s0"), load=Load(1, 0, 12))]
    late = [each.message for each in sessions.admit(5.0) if isinstance(each, Send)]
    assert [type(each) for each in late] == [Refused, Opened]


def test_only_a_stage_of_its_route_can_send_a_session_away() -> None:
    mesh = SmallMesh(6, THREE)
    mesh.ask((1, 2, 3), 5)
    generation = mesh.generations[0]
    assert generation.session is not None
    assert generation.preempted(Preempted(generation.session), NodeId("stranger")) == []
