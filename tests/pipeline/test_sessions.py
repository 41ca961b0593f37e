"""Invariant 2 on the real session code: nothing lost, nothing doubled, every page comes back."""

import random

import pytest

from shoal.errors import PromptTooLong, StageLost
from shoal.pipeline.messages import Lost, RowEntry
from shoal.pipeline.stage import Drop, Send
from shoal.units import NodeId, SessionId, Slice

from .small_mesh import GATEWAY, SmallMesh, expected

THREE = {"a": Slice(0, 2), "b": Slice(2, 4), "c": Slice(4, 6)}
SPARE = {**THREE, "b2": Slice(2, 4)}
DOUBLE = {**THREE, "a2": Slice(0, 2), "b2": Slice(2, 4), "c2": Slice(4, 6), "whole": Slice(0, 6)}


def run_out(mesh: SmallMesh) -> None:
    for _ in range(200_000):
        if not mesh.turn():
            return
    raise AssertionError("the mesh never came to rest")


def assert_all_pages_are_back(mesh: SmallMesh) -> None:
    for node in mesh.nodes.values():
        assert len(node.sessions) == 0
        assert node.sessions.pool.used_fraction == 0


@pytest.mark.parametrize(
    "slices", [{"whole": Slice(0, 6)}, THREE], ids=["one stage", "three stages"]
)
def test_the_text_is_that_of_the_unsplit_model(slices: dict[str, Slice]) -> None:
    mesh = SmallMesh(1, slices)
    asked = [mesh.ask((3, 1, 4, 1, 5, 9, 2, 6, 5), 7), mesh.ask((2, 7), 12)]
    run_out(mesh)
    assert mesh.delivered[asked[0]] == expected((3, 1, 4, 1, 5, 9, 2, 6, 5), 7)
    assert mesh.delivered[asked[1]] == expected((2, 7), 12)
    assert [finish.reason for finish in mesh.finished if finish] == ["length", "length"]
    assert_all_pages_are_back(mesh)


def test_a_lost_stage_does_not_lose_the_session_when_a_spare_holds_its_layers() -> None:
    mesh = SmallMesh(2, SPARE)
    mesh.ask((5, 6, 7), 20)
    while len(mesh.delivered[0]) < 8:
        mesh.turn()
    plan = mesh.generations[0].plan
    assert plan is not None
    mesh.kill(plan.stops[1].node)
    run_out(mesh)
    assert mesh.delivered[0] == expected((5, 6, 7), 20)
    assert mesh.generations[0].attempt == 2
    assert_all_pages_are_back(mesh)


def test_without_a_spare_there_is_one_explicit_error() -> None:
    mesh = SmallMesh(3, THREE)
    mesh.ask((5, 6, 7), 20)
    while len(mesh.delivered[0]) < 8:
        mesh.turn()
    mesh.kill("b")
    run_out(mesh)
    finish = mesh.finished[0]
    assert finish is not None
    assert isinstance(finish.error, StageLost)
    assert mesh.delivered[0] == expected((5, 6, 7), 8)
    assert_all_pages_are_back(mesh)


def test_a_session_that_never_fits_is_refused_with_the_reason() -> None:
    mesh = SmallMesh(4, THREE, pages=3)
    mesh.ask((1, 2, 3), 100)
    run_out(mesh)
    finish = mesh.finished[0]
    assert finish is not None
    assert isinstance(finish.error, PromptTooLong)
    assert_all_pages_are_back(mesh)


def test_sessions_queue_for_pages_and_all_are_answered() -> None:
    mesh = SmallMesh(5, SPARE, pages=6)
    prompts = [(n, n + 1, n + 2) for n in range(12)]
    for prompt in prompts:
        mesh.ask(prompt, 9)
    run_out(mesh)
    assert mesh.delivered == [expected(prompt, 9) for prompt in prompts]
    assert_all_pages_are_back(mesh)


@pytest.mark.parametrize("block", range(12))
def test_under_any_schedule_of_kills_and_cancellations_nothing_is_lost_or_doubled(
    block: int,
) -> None:
    for seed in range(block * 25, block * 25 + 25):
        chance = random.Random(seed)
        mesh = SmallMesh(seed, DOUBLE, pages=chance.choice([8, 12, 40]))
        wanted = []
        for _ in range(chance.randint(1, 6)):
            prompt = tuple(chance.randrange(97) for _ in range(chance.randint(1, 11)))
            count = chance.randint(1, 14)
            mesh.ask(prompt, count)
            wanted.append(expected(prompt, count))
        for _ in range(chance.randint(0, 3)):
            for _ in range(chance.randint(1, 300)):
                mesh.turn()
            if chance.random() < 0.3:
                mesh.cancel(chance.randrange(len(wanted)))
            elif len(mesh.nodes) > 1:
                mesh.kill(chance.choice(sorted(mesh.nodes)))
        run_out(mesh)
        for got, whole, finish in zip(mesh.delivered, wanted, mesh.finished, strict=True):
            assert finish is not None, f"seed {seed}: a generation never ended"
            assert got == whole[: len(got)], f"seed {seed}"
            if finish.reason == "length":
                assert got == whole, f"seed {seed}"
            elif finish.reason != "cancelled":
                assert finish.error is not None, f"seed {seed}"
        assert_all_pages_are_back(mesh)


def test_only_the_stage_before_may_send_rows_and_only_in_order() -> None:
    mesh = SmallMesh(6, THREE)
    mesh.ask((1, 2, 3), 5)
    middle = mesh.nodes[NodeId("b")]
    while not middle.sessions.ids() or mesh.generations[0].state != "running":
        mesh.turn()
    session = middle.sessions.ids()[0]
    assert middle.sessions.receive(RowEntry(session, 0, 1), [1], NodeId("stranger"), 0.0) == []
    assert middle.sessions.close(session, NodeId("stranger"), 0.0) == []
    unknown = RowEntry(SessionId("unknown"), 0, 1)
    assert middle.sessions.receive(unknown, [1], NodeId("a"), 0.0) == []
    assert middle.sessions.ids() == [session]
    told, dropped = middle.sessions.receive(RowEntry(session, 77, 1), [1], NodeId("a"), 0.0)
    assert isinstance(told, Send)
    assert told.node == GATEWAY
    assert isinstance(told.message, Lost)
    assert told.message.node == "a"
    assert dropped == Drop(session)
    assert middle.sessions.ids() == []
