"""A route that breaks is mended around the stages that go on: the text is the same, each token
comes once, every page comes back, and nobody computes again what it has.
"""

import random

import pytest

from shoal.pipeline.messages import Opened
from shoal.units import NodeId, Slice

from .small_mesh import GATEWAY, SmallMesh, expected
from .test_sessions import assert_all_pages_are_back, run_out

THREE = {"a": Slice(0, 2), "b": Slice(2, 4), "c": Slice(4, 6)}
DOUBLE = {**THREE, "a2": Slice(0, 2), "b2": Slice(2, 4), "c2": Slice(4, 6)}
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5)
TOKENS = 8


def assert_nothing_is_left(mesh: SmallMesh) -> None:
    assert_all_pages_are_back(mesh)
    for node in mesh.nodes.values():
        assert len(node.sessions.history) == node.sessions.history.nbytes == 0
        assert not node.sessions._former


def steps_of(**how: object) -> int:
    mesh = SmallMesh(1, THREE, **how)
    mesh.ask(PROMPT, TOKENS)
    steps = 0
    while mesh.turn():
        steps += 1
    return steps


def started(seed: int, steps: int, slices: dict[str, Slice] = DOUBLE, **how: object) -> SmallMesh:
    mesh = SmallMesh(seed, slices, **how)
    mesh.ask(PROMPT, TOKENS)
    for _ in range(steps):
        mesh.turn()
    return mesh


def stop_of(mesh: SmallMesh, at: int) -> str:
    plan = mesh.generations[0].plan
    assert plan is not None
    return plan.stops[at % len(plan.stops)].node


def assert_whole(mesh: SmallMesh, seed: object = "") -> None:
    run_out(mesh)
    assert mesh.delivered[0] == expected(PROMPT, TOKENS), seed
    assert mesh.finished[0] is not None
    assert mesh.finished[0].error is None
    assert_nothing_is_left(mesh)


@pytest.mark.parametrize("at", [0, 1, 2], ids=["head", "middle", "tail"])
@pytest.mark.parametrize("how", ["kill", "pause", "unlink"])
def test_a_stage_may_go_at_any_step(at: int, how: str) -> None:
    for step in range(1, steps_of()):
        mesh = started(step, step)
        if mesh.finished[0]:
            continue
        lost = stop_of(mesh, at)
        if how == "kill":
            mesh.kill(lost)
        elif how == "pause":
            mesh.pause(lost)
            for _ in range(step % 40):
                mesh.turn()
            mesh.wake(lost)
            for _ in range(step % 7):
                mesh.turn()
            mesh.find_links_gone(lost)
        else:
            mesh.unlink(lost, stop_of(mesh, at + 1))
        assert_whole(mesh, (how, at, step))


def test_who_goes_on_does_not_compute_its_prompt_again() -> None:
    for at in range(3):
        mesh = SmallMesh(7, DOUBLE)
        mesh.ask(PROMPT, TOKENS)
        while len(mesh.delivered[0]) < 4:
            mesh.turn()
        plan = mesh.generations[0].plan
        assert plan is not None
        lost, *others = [stop.node for stop in (*plan.stops[at:], *plan.stops[:at])]
        mesh.kill(lost)
        assert_whole(mesh)
        assert mesh.kinds == ["new", "replayed"]
        for node in others:
            assert mesh.nodes[node].tokens <= len(PROMPT) + TOKENS + 1  # the row that was lost
        assert mesh.replayed == (0 if at == 0 else mesh.generations[0].replayed)
        assert at == 0 or mesh.replayed > len(PROMPT)


def test_without_room_for_what_was_sent_the_stages_before_compute_again() -> None:
    for step in range(1, steps_of(), 2):
        mesh = started(step, step, history_bytes=0)
        if mesh.finished[0]:
            continue
        mesh.kill(stop_of(mesh, step % 3))
        assert_whole(mesh, step)
        assert mesh.replayed == 0


def test_a_planner_that_keeps_nobody_costs_nothing_but_time() -> None:
    for step in range(1, steps_of(), 2):
        mesh = started(step, step, keeps=False)
        mesh.kill(stop_of(mesh, step % 3))
        if not mesh.finished[0]:
            assert_whole(mesh, step)


def test_stages_that_cannot_go_back_begin_anew() -> None:
    for step in range(1, steps_of(), 2):
        mesh = started(step, step, rewinds=False, share_prefixes=False)
        if mesh.finished[0]:
            continue
        mesh.kill(stop_of(mesh, step % 3))
        assert_whole(mesh, step)


def test_layers_that_look_back_only_so_far_are_mended_too() -> None:
    for step in range(1, steps_of(window=5), 2):
        mesh = started(step, step, window=5)
        if mesh.finished[0]:
            continue
        mesh.kill(stop_of(mesh, step % 3))
        run_out(mesh)
        assert mesh.delivered[0] == expected(PROMPT, TOKENS, 5), step
        assert_nothing_is_left(mesh)


PIECES = {**THREE, "b1": Slice(2, 3), "b2": Slice(3, 4), "c2": Slice(4, 6), "a1": Slice(0, 1),
          "a2": Slice(1, 2)}  # fmt: skip


def test_several_stages_may_take_the_place_of_one() -> None:
    for step in range(1, steps_of(), 2):
        mesh = SmallMesh(step, PIECES)
        mesh.ask(PROMPT, TOKENS)
        for _ in range(step):
            mesh.turn()
        for name in ("a", "b"):
            mesh.kill(name)
        if not mesh.finished[0]:
            assert_whole(mesh, step)


WIDE = {"a": Slice(0, 3), "b": Slice(2, 5), "c": Slice(4, 6), "d": Slice(0, 4), "e": Slice(1, 6)}


def test_a_stage_runs_any_part_of_its_layers() -> None:
    for seed in range(120):
        mesh = started(seed, seed % 97, WIDE, parts=True)
        mesh.kill(mesh.random.choice("abd"))
        run_out(mesh)
        assert mesh.delivered[0] == expected(PROMPT, TOKENS)[: len(mesh.delivered[0])]
        finish = mesh.finished[0]
        assert finish is not None
        if finish.error is None:
            assert mesh.delivered[0] == expected(PROMPT, TOKENS)
        assert_nothing_is_left(mesh)


def test_who_leaves_is_missed_by_nobody() -> None:
    for step in range(1, steps_of()):
        mesh = started(step, step)
        if mesh.finished[0] or mesh.generations[0].state != "running":
            continue
        mesh.leave(stop_of(mesh, step % 3))
        assert_whole(mesh, step)
        assert set(mesh.kinds) <= {"new", "handed over"}


def test_who_cannot_be_replaced_serves_on_when_it_wants_to_leave() -> None:
    mesh = started(3, 80, THREE)
    mesh.leave("b")
    assert_whole(mesh)
    assert mesh.kinds == ["new"]
    assert not mesh.generations[0].avoid


def test_a_gateway_that_dies_in_the_middle_of_a_recovery_frees_everything() -> None:
    for step in range(1, steps_of(), 2):
        mesh = started(step, step)
        mesh.kill(stop_of(mesh, step % 3))
        for _ in range(step % 30):
            mesh.turn()
        mesh.lose_gateway(GATEWAY)
        run_out(mesh)
        assert_nothing_is_left(mesh)


def test_who_is_never_told_how_to_go_on_frees_everything_in_the_end() -> None:
    mesh = started(5, 80)
    lost = NodeId(stop_of(mesh, 1))
    for name in [stop_of(mesh, 0), stop_of(mesh, 2)]:
        node = mesh.nodes[NodeId(name)]
        mesh._do(node, node.sessions.node_lost(lost, "killed", mesh.now))
    mesh.links = {key: queue for key, queue in mesh.links.items() if GATEWAY not in key}
    mesh._gateways[0] = NodeId("nobody")
    mesh.nodes.pop(lost)
    run_out(mesh)
    assert_nothing_is_left(mesh)


MANY = {f"{name}{at}": cut for name, cut in THREE.items() for at in range(4)}


def mesh_by_chance(chance: random.Random, seed: int) -> SmallMesh:
    guesses = chance.random() < 0.3
    return SmallMesh(
        seed,
        MANY,
        pages=chance.choice([12, 40]),
        history_bytes=chance.choice([0, 20, 1 << 20, 1 << 20]),
        keeps=chance.random() < 0.9,
        parts=chance.random() < 0.3,
        guess=(lambda wish: (wish.ids[-1] * 7 % 97, 5)[: wish.count]) if guesses else None,
    )


def wake(mesh: SmallMesh, asleep: list[str]) -> None:
    name = asleep.pop(0)
    mesh.wake(name)
    mesh.find_links_gone(name)


def one_fault(mesh: SmallMesh, chance: random.Random, asleep: list[str]) -> None:
    awake = sorted(set(mesh.nodes) - {NodeId("a0"), *asleep})
    match chance.choice(["kill", "kill", "pause", "unlink", "leave", "wake", "cancel"]):
        case "kill":
            mesh.kill(chance.choice(awake))
        case "pause":
            asleep.append(chance.choice(awake))
            mesh.pause(asleep[-1])
        case "unlink":
            mesh.unlink(*chance.sample(awake, 2))
        case "leave":
            mesh.leave(chance.choice(awake))
        case "wake" if asleep:
            wake(mesh, asleep)
        case "cancel" if chance.random() < 0.3:
            mesh.cancel(chance.randrange(len(mesh.generations)))


def assert_each_is_whole_or_told_why(mesh: SmallMesh, wanted: list[list[int]], seed: int) -> None:
    for got, whole, finish in zip(mesh.delivered, wanted, mesh.finished, strict=True):
        assert finish is not None, f"seed {seed}: a generation never ended"
        assert got == whole[: len(got)], f"seed {seed}"
        if finish.reason == "length":
            assert got == whole, f"seed {seed}"
        elif finish.reason != "cancelled":
            assert finish.error is not None, f"seed {seed}"


@pytest.mark.parametrize("block", range(8))
def test_under_any_faults_each_token_comes_once_and_every_page_comes_back(block: int) -> None:
    for seed in range(block * 40, block * 40 + 40):
        chance = random.Random(seed)
        mesh = mesh_by_chance(chance, seed)
        wanted: list[list[int]] = []
        for at in range(chance.randint(1, 4)):
            prompt = tuple(chance.randrange(97) for _ in range(chance.randint(1, 11)))
            count = chance.randint(1, 14)
            mesh.ask(prompt, count, GATEWAY if at % 2 else NodeId("a0"))  # one is a stage itself
            wanted.append(expected(prompt, count))
        asleep: list[str] = []
        for _ in range(chance.randint(1, 5)):
            for _ in range(chance.randint(1, 120)):
                mesh.turn()
            one_fault(mesh, chance, asleep)
            mesh.assert_pages_are_counted_right()
        while asleep:
            wake(mesh, asleep)
        run_out(mesh)
        assert_each_is_whole_or_told_why(mesh, wanted, seed)
        assert_nothing_is_left(mesh)


def test_after_a_recovery_nobody_else_finds_what_the_session_computed() -> None:
    """A digest stands for the route on which a page was filled."""
    mesh = SmallMesh(7, DOUBLE)
    mesh.ask(PROMPT, 30)
    while len(mesh.delivered[0]) < 4:
        mesh.turn()
    mesh.kill(stop_of(mesh, 1))
    while mesh.generations[0].state != "running":
        mesh.turn()
    named = {node.id: set(node.sessions.pool._names.values()) for node in mesh.nodes.values()}
    run_out(mesh)
    assert mesh.delivered[0] == expected(PROMPT, 30)
    for node in mesh.nodes.values():
        assert set(node.sessions.pool._names.values()) <= named[node.id]


def test_a_session_whose_beginning_was_found_is_mended_too() -> None:
    for seed in range(30):
        mesh = SmallMesh(seed, DOUBLE)
        mesh.ask(PROMPT, 6)
        run_out(mesh)
        turn = (*PROMPT, *mesh.delivered[0], 8)
        mesh.ask(turn, TOKENS)
        for _ in range(30 + 4 * seed):
            mesh.turn()
        plan = mesh.generations[1].plan
        assert plan is not None
        mesh.kill(plan.stops[seed % 3].node)
        run_out(mesh)
        assert mesh.delivered[1] == expected(turn, TOKENS)
        assert_nothing_is_left(mesh)


def test_a_stage_that_claims_to_have_what_nobody_gave_it_is_avoided() -> None:
    mesh = SmallMesh(7, {**DOUBLE, "b3": Slice(2, 4)})
    mesh.ask(PROMPT, TOKENS)
    while len(mesh.delivered[0]) < 4:
        mesh.turn()
    generation = mesh.generations[0]
    mesh.kill(stop_of(mesh, 1))
    liar = NodeId(stop_of(mesh, 1))
    assert generation.session is not None
    mesh._gateway(0, generation.opened(Opened(generation.session, 5), liar))
    assert liar in generation.avoid
    assert_whole(mesh)
