"""A stage behind which another engine computes: who gets its places, and what gateways are told."""

from __future__ import annotations

import random

import pytest

from shoal.engine.request import Sampled, Sampling
from shoal.errors import BadMessage
from shoal.pipeline.fronted_sessions import FrontedSessions, Halt, Say, Slots, Start
from shoal.pipeline.messages import Lost, Open, Opened, Refused, Tokens
from shoal.units import ModelId, NodeId, SessionId, Slice

ME, NEAR, FAR = NodeId("me"), NodeId("near"), NodeId("far")
CONTEXT = 64


def sessions(slots: int = 2, share: float = 1.0) -> FrontedSessions:
    refuses = lambda sampling: "it has no top_k" if sampling.top_k else ""  # noqa: E731
    return FrontedSessions(ME, 100, Slots(slots, CONTEXT), refuses, share)


def opening(name: str, known: int = 3, output: int = 0, **more: object) -> Open:
    usual = {"sampling": Sampling(max_tokens=8), "reserve_tokens": known - output + 8}
    return Open(
        session=SessionId(name),
        model=ModelId("m"),
        compute="served",
        layers=Slice(0, 4),
        previous=ME,
        next=ME,
        known_tokens=known,
        output_tokens=output,
        **{**usual, **more},  # type: ignore[arg-type]
    )


def open_(stage: FrontedSessions, name: str, gateway: NodeId = NEAR, now: float = 0.0, **more):
    message = opening(name, **more)
    return stage.open(message, tuple(range(1, message.known_tokens + 1)), gateway, now)


def refusal(instructions: list) -> str:
    (said,) = instructions
    assert isinstance(said.message, Refused)
    return said.message.reason


def test_a_session_starts_at_once_when_a_slot_is_free() -> None:
    said, start = open_(sessions(), "a", known=5, output=2)
    assert said == Say(NEAR, Opened(SessionId("a")))
    assert isinstance(start, Start)
    assert (start.job.prompt_ids, start.job.output_ids) == ((1, 2, 3), (4, 5))
    assert start.job.room == 6


def test_tokens_are_numbered_from_where_an_earlier_route_left_off() -> None:
    stage = sessions()
    open_(stage, "a", known=5, output=2)
    (said,) = stage.tokens(SessionId("a"), [Sampled(7), Sampled(8)], 0.0)
    assert isinstance(said.message, Tokens)
    assert [entry.index for entry in said.message.entries] == [2, 3]


def test_whoever_finds_no_slot_queues_as_long_as_it_may() -> None:
    stage = sessions(slots=1)
    open_(stage, "a")
    assert refusal(open_(stage, "b")) == "busy"
    assert open_(stage, "c", patience_s=5.0) == []
    assert stage.waiting == 1
    assert stage.next_deadline() == 5.0
    assert refusal(stage.admit(5.0)) == "busy"
    assert open_(stage, "d", patience_s=5.0, now=6.0) == []
    halted, opened, start = stage.close(SessionId("a"), NEAR, 7.0)
    assert halted == Halt(SessionId("a"))
    assert opened == Say(NEAR, Opened(SessionId("d")))
    assert isinstance(start, Start)


def test_a_finished_answer_frees_its_slot() -> None:
    stage = sessions(slots=1)
    open_(stage, "a")
    assert stage.pool.free_tokens == 0
    _, halt = stage.tokens(SessionId("a"), [Sampled(7, "stop")], 0.0)
    assert halt == Halt(SessionId("a"))
    assert (len(stage), stage.pool.free_tokens, stage.pool.used_fraction) == (0, CONTEXT, 0.0)
    assert stage.tokens(SessionId("a"), [Sampled(7)], 0.0) == []
    assert stage.close(SessionId("a"), NEAR, 0.0) == []


def test_what_can_never_be_is_refused_with_a_reason() -> None:
    stage = sessions()
    assert refusal(open_(stage, "a", known=60)) == "never"
    assert refusal(stage.open(opening("b"), (1, 2, 100), NEAR, 0.0)) == "never"
    assert refusal(open_(stage, "c", sampling=Sampling(top_k=3, max_tokens=8))) == "invalid"
    assert len(stage) == 0


@pytest.mark.parametrize("wrong", [{"sampling": None}, {"known": 4}])
def test_what_no_honest_gateway_sends_costs_it_the_link(wrong: dict) -> None:
    with pytest.raises(BadMessage):
        sessions().open(opening("a", **wrong), (1, 2, 3), NEAR, 0.0)


def test_a_session_id_belongs_to_whoever_came_first() -> None:
    stage = sessions()
    open_(stage, "a")
    assert refusal(open_(stage, "a", gateway=FAR)) == "gone"
    with pytest.raises(BadMessage):
        open_(stage, "a")
    assert stage.close(SessionId("a"), FAR, 0.0) == []
    assert SessionId("a") in stage


def test_one_stranger_does_not_take_every_slot() -> None:
    stage = sessions(slots=4, share=0.5)
    for name in "ab":
        assert isinstance(open_(stage, name, gateway=FAR)[1], Start)
    assert refusal(open_(stage, "c", gateway=FAR)) == "busy"
    for name in "de":
        assert isinstance(open_(stage, name, gateway=ME)[1], Start)


def test_a_failing_engine_is_told_to_the_gateway() -> None:
    stage = sessions()
    open_(stage, "a")
    said, halt = stage.fail(SessionId("a"), "it broke\x1b", 0.0)
    assert said == Say(NEAR, Lost(SessionId("a"), ME, "it broke"))
    assert halt == Halt(SessionId("a"))


def test_the_sessions_of_a_lost_gateway_end() -> None:
    stage = sessions()
    open_(stage, "a", gateway=FAR)
    open_(stage, "b")
    assert stage.node_lost(FAR, 0.0) == [Halt(SessionId("a"))]
    assert stage.ids() == ["b"]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_slots_are_counted_right(seed: int) -> None:
    chance = random.Random(seed)
    stage, running, now = sessions(slots=3, share=0.7), set(), 0.0
    for turn in range(200):
        name, now = SessionId(f"s{turn}"), now + 0.1
        some = SessionId(f"s{chance.randrange(turn + 1)}")
        gateway = chance.choice([ME, NEAR, FAR])
        match chance.randrange(6):
            case 0 | 1:
                out = open_(stage, name, gateway, now, patience_s=chance.choice([0.0, 2.0]))
            case 2:
                out = stage.close(some, gateway, now)
            case 3:
                out = stage.tokens(some, [Sampled(1, "length")], now) if some in running else []
            case 4:
                out = stage.fail(some, "x", now)
            case _:
                out = stage.admit(now) if chance.random() < 0.9 else stage.node_lost(gateway, now)
        for instruction in out:
            if isinstance(instruction, Start):
                running.add(instruction.session)
            elif isinstance(instruction, Halt):
                running.remove(instruction.session)
        assert stage.pool.used == len(running) <= 3
        assert {*stage.ids()} >= running
        assert len(stage) - stage.waiting == len(running)
    for session in stage.ids():
        stage.fail(session, "over", now)
    assert stage.pool.used == len(stage) == 0
