"""Pages shared across sessions and turns: the text is that of the compute without them, whatever
happens when.
"""

import random
from itertools import product

import pytest

from shoal.engine.prefix import page_digests
from shoal.engine.request import Sampling
from shoal.pipeline.messages import Open, Opened
from shoal.pipeline.stage import Connect, Send
from shoal.units import ModelId, NodeId, SessionId, Slice

from .small_mesh import GATEWAY, PAGE, SmallMesh, expected
from .test_sessions import DOUBLE, THREE, assert_all_pages_are_back, run_out

OTHER = NodeId("other gateway")
SYSTEM = (9, 8, 7, 6, 5, 4, 3, 2, 1)


def hits(mesh: SmallMesh) -> list[int]:
    return [each.hit_tokens for each in mesh.matched]


@pytest.mark.parametrize("slices", [{"whole": Slice(0, 6)}, THREE], ids=["one", "three"])
def test_a_second_turn_computes_what_is_new_only(slices: dict[str, Slice]) -> None:
    mesh = SmallMesh(1, slices)
    mesh.ask(SYSTEM, 6)
    run_out(mesh)
    assert set(hits(mesh)) == {0}
    turn = (*SYSTEM, *mesh.delivered[0], 11, 12, 13)
    mesh.ask(turn, 6)
    run_out(mesh)
    known = len(SYSTEM) + 6 - 1  # nobody has computed the last token
    assert hits(mesh)[len(slices) :] == [known // PAGE * PAGE] * len(slices)
    assert mesh.delivered[1] == expected(turn, 6)
    assert_all_pages_are_back(mesh)


def test_the_last_known_token_is_always_computed() -> None:
    mesh = SmallMesh(2, THREE)
    prompt = tuple(range(3 * PAGE))
    for _ in range(2):
        mesh.ask(prompt, 3)
        run_out(mesh)
    assert hits(mesh)[3:] == [2 * PAGE] * 3
    assert mesh.delivered == [expected(prompt, 3)] * 2


def test_sessions_that_run_at_the_same_time_share_their_beginning() -> None:
    mesh = SmallMesh(3, THREE)
    mesh.ask((*SYSTEM, 1, 2, 3), 30)
    while len(mesh.delivered[0]) < 3:
        mesh.turn()
    mesh.ask((*SYSTEM, 4, 5, 6), 4)
    run_out(mesh)
    assert hits(mesh)[3:] == [2 * PAGE] * 3
    assert mesh.delivered == [expected((*SYSTEM, 1, 2, 3), 30), expected((*SYSTEM, 4, 5, 6), 4)]


def test_another_gateway_finds_nothing() -> None:
    mesh = SmallMesh(4, THREE)
    mesh.ask(SYSTEM, 4)
    run_out(mesh)
    mesh.ask(SYSTEM, 4, OTHER)
    run_out(mesh)
    assert set(hits(mesh)) == {0}


def test_the_stages_agree_on_the_least_that_all_of_them_have() -> None:
    mesh = SmallMesh(5, THREE)
    prompt = tuple(range(20))
    mesh.ask(prompt, 2)
    run_out(mesh)
    for name, kept in (("b", 3), ("a", 4)):  # the others have 4 and 5 of five pages
        pool = mesh.nodes[NodeId(name)].sessions.pool
        while len(pool._idle) > kept:
            pool._forget(pool._idle.popitem(last=False)[0])
    mesh.ask(prompt, 2)
    run_out(mesh)
    assert set(hits(mesh)[3:]) == {3 * PAGE}
    assert mesh.delivered == [expected(prompt, 2)] * 2
    assert_all_pages_are_back(mesh)


def test_a_route_with_another_stage_on_it_shares_nothing_with_this_one() -> None:
    mesh = SmallMesh(6, {**THREE, "b2": Slice(2, 4)})
    for _ in range(12):
        mesh.ask(SYSTEM, 4)
        run_out(mesh)
    routes = [
        tuple(stop.node for stop in each.plan.stops) for each in mesh.generations if each.plan
    ]
    first = [routes.index(route) for route in routes]
    found = [hits(mesh)[3 * at : 3 * at + 3] for at in range(12)]
    fresh = [at for at in range(12) if first[at] == at]
    assert len(fresh) == 2
    named = mesh.nodes[NodeId("a")].sessions.pool._named
    assert len(named) == 2 * ((len(SYSTEM) + 4 - 1) // PAGE)  # the same text, once for each route
    assert all((found[at] == [0, 0, 0]) == (at in fresh) for at in range(12))


@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("window", [None, 5], ids=["whole contexts", "windows"])
def test_under_any_schedule_the_text_is_that_without_sharing(
    block: int, window: int | None
) -> None:
    hit = 0
    for seed in range(block * 20, block * 20 + 20):
        chance = random.Random(seed)
        mesh = SmallMesh(seed, DOUBLE, pages=chance.choice([10, 16, 40]), window=window)
        wanted = []
        for _ in range(chance.randint(2, 9)):
            prompt = tuple(  # of few beginnings, so that there is something to share
                chance.choice([SYSTEM, SYSTEM[:6], (1,) * 9])[: chance.randint(1, 9)]
                + tuple(chance.randrange(2) for _ in range(chance.randint(0, 4)))
            )
            count = chance.randint(1, 12)
            mesh.ask(prompt, count, chance.choice([GATEWAY, OTHER]))
            wanted.append(expected(prompt, count, window or 10**6))
            for _ in range(chance.choice([0, 40, 400])):
                mesh.turn()
                if chance.random() < 0.02:
                    mesh.assert_pages_are_counted_right()
            if chance.random() < 0.1:
                mesh.cancel(chance.randrange(len(wanted)))
            elif chance.random() < 0.1 and len(mesh.nodes) > 1:
                mesh.kill(chance.choice(sorted(mesh.nodes)))
        run_out(mesh)
        for got, whole, finish in zip(mesh.delivered, wanted, mesh.finished, strict=True):
            assert finish is not None, f"seed {seed}: a generation never ended"
            assert got == whole[: len(got)], f"seed {seed}"
            assert finish.reason != "length" or got == whole, f"seed {seed}"
        mesh.assert_pages_are_counted_right()
        assert_all_pages_are_back(mesh)
        hit += sum(hits(mesh))
    assert hit > 0


def test_pages_that_no_window_reaches_are_free_while_the_session_runs() -> None:
    mesh = SmallMesh(9, {"whole": Slice(0, 6)}, window=6)
    mesh.ask((1, 2, 3), 60)
    pool = mesh.nodes[NodeId("whole")].sessions.pool
    held = []
    while mesh.turn():
        held.append(pool.pages - pool.free_pages)
    assert mesh.delivered == [expected((1, 2, 3), 60, 6)]
    assert max(held) <= 5  # the window, its ragged ends, and headroom for what comes next
    assert_all_pages_are_back(mesh)


# ---- a gateway may say anything

MALLORY = NodeId("mallory")


def open_of(session: str, known: int, digests: int, **changed: int) -> Open:
    return Open(
        SessionId(session), ModelId("toy"), "f32", Slice(0, 6), NodeId("whole"), NodeId("whole"),
        known, known + 3, sampling=Sampling(temperature=0, max_tokens=3), page_tokens=PAGE,
        digests=digests, prefix_tokens=changed.get("prefix_tokens", digests * PAGE),
    )  # fmt: skip


def opened(mesh: SmallMesh, message: Open, ids: tuple[int, ...], digests: list[bytes]) -> Opened:
    """What the stage answers, once it is connected."""
    sessions = mesh.nodes[NodeId("whole")].sessions
    (connect,) = sessions.open(message, ids, MALLORY, 0.0, digests)
    assert isinstance(connect, Connect)
    told = sessions.connected(message.session, 0.0)[0]
    assert isinstance(told, Send)
    assert isinstance(told.message, Opened)
    return told.message


def test_digests_of_a_hostile_gateway_find_and_hurt_nobody_elses_pages() -> None:
    mesh = SmallMesh(7, {"whole": Slice(0, 6)})
    mesh.ask(SYSTEM, 4)
    run_out(mesh)
    pool = mesh.nodes[NodeId("whole")].sessions.pool
    stolen = [digest for _, digest in pool._named]
    message = open_of("m1", 13, len(stolen))
    assert opened(mesh, message, (1,) * 13, stolen).prefix_tokens == 0
    sessions = mesh.nodes[NodeId("whole")].sessions
    sessions.close(SessionId("m1"), MALLORY, 0.0, stolen * 100)  # it has computed nothing
    mesh.ask(SYSTEM, 4)
    run_out(mesh)
    assert mesh.delivered == [expected(SYSTEM, 4)] * 2
    assert_all_pages_are_back(mesh)


@pytest.mark.parametrize(("repeated", "limit"), [*product([False, True], [0, 5, 8, 1 << 30])])
def test_whatever_it_claims_about_its_own_pages_their_number_adds_up(
    repeated: bool, limit: int
) -> None:
    mesh = SmallMesh(8, {"whole": Slice(0, 6)})
    digests = page_digests((1,) * 12, PAGE, b"")
    digests = digests[:1] * 3 if repeated else digests
    for session in ("m1", "m2", "m3"):
        message = open_of(session, 13, 3, prefix_tokens=limit)
        answer = opened(mesh, message, (1,) * 13, digests)
        assert answer.prefix_tokens <= min(limit, 12)
        assert answer.prefix_tokens % PAGE == 0
        sessions = mesh.nodes[NodeId("whole")].sessions
        sessions.close(SessionId(session), MALLORY, 0.0, digests)
        mesh.assert_pages_are_counted_right()
    assert_all_pages_are_back(mesh)


def test_pages_of_another_size_are_not_shared() -> None:
    mesh = SmallMesh(9, {"whole": Slice(0, 6)}, pages=40)
    mesh.generations.clear()
    for number in range(2):
        message = Open(
            SessionId(f"m{number}"), ModelId("toy"), "f32", Slice(0, 6), NodeId("whole"),
            NodeId("whole"), 13, 16, sampling=Sampling(max_tokens=3), page_tokens=2, digests=6,
            prefix_tokens=12,
        )  # fmt: skip
        assert opened(mesh, message, (1,) * 13, [b"x" * 16] * 6).prefix_tokens == 0
