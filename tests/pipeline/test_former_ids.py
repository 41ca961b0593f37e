"""A session that goes by a new id: its former one is not free while rows of it are computed."""

from __future__ import annotations

import pytest

from shoal.engine.prefix import PrefixPool
from shoal.engine.rows import Row
from shoal.engine.sampling import SamplerState
from shoal.errors import BadMessage
from shoal.pipeline.messages import Open, Refused, Resume, RowEntry
from shoal.pipeline.stage import Connect, Enqueue, Instruction, Send, StageSessions
from shoal.units import ModelId, NodeId, SessionId, Slice

ME, ALICE, MALLORY = NodeId("me"), NodeId("alice"), NodeId("mallory")
ONE, TWO, THREE = (SessionId(digit * 16) for digit in "123")


def stage() -> StageSessions:
    pool = PrefixPool(32, 16)
    return StageSessions(ME, False, False, 100, 500, pool, SamplerState, layers=Slice(2, 4))


def opened(sessions: StageSessions, session: SessionId, gateway: NodeId) -> list[Instruction]:
    message = Open(session, ModelId("m"), "f32", Slice(2, 4), gateway, gateway, 8, 64)
    out = sessions.open(message, (), gateway, 0.0)
    if any(isinstance(each, Connect) for each in out):
        sessions.connected(session, 0.0)
    return out


def computing(sessions: StageSessions, session: SessionId, gateway: NodeId) -> list[Row]:
    """A prompt of which a forward is under way."""
    opened(sessions, session, gateway)
    out = sessions.receive(RowEntry(session, 0, 8), memoryview(b""), gateway, 0.0)
    rows = [each.row for each in out if isinstance(each, Enqueue)]
    sessions.begin(rows)
    return rows


def moved(sessions: StageSessions, session: SessionId, to: SessionId, gateway: NodeId) -> list:  # type: ignore[type-arg]
    return sessions.resume(Resume(session, to, 8, 0, gateway, gateway), (), gateway, 0.0)


def assert_nothing_leaks(sessions: StageSessions, rows: list[Row], gateway: NodeId) -> None:
    sessions.finish(rows, [()] * len(rows), 0.0)
    for session in (ONE, TWO, THREE):
        sessions.close(session, gateway, 0.0)
        sessions.close(session, ALICE, 0.0)
    for node in (gateway, ALICE):
        sessions.node_lost(node, "gone", 0.0)
    assert len(sessions) == 0
    assert sessions.pool.used_fraction == 0


def test_a_former_id_is_not_opened_anew_before_its_rows_are_computed() -> None:
    sessions = stage()
    rows = computing(sessions, ONE, MALLORY)
    moved(sessions, ONE, TWO, MALLORY)
    with pytest.raises(BadMessage):
        opened(sessions, ONE, MALLORY)
    assert_nothing_leaks(sessions, rows, MALLORY)


def test_a_former_id_of_anothers_session_is_taken() -> None:
    sessions = stage()
    rows = computing(sessions, ONE, ALICE)
    moved(sessions, ONE, TWO, ALICE)
    answers = [each for each in opened(sessions, ONE, MALLORY) if isinstance(each, Send)]
    assert [each.message.reason for each in answers if isinstance(each.message, Refused)] == [
        "gone"
    ]
    assert_nothing_leaks(sessions, rows, MALLORY)


def test_no_session_is_renamed_to_a_former_id() -> None:
    sessions = stage()
    rows = computing(sessions, ONE, ALICE)
    moved(sessions, ONE, TWO, ALICE)
    opened(sessions, THREE, MALLORY)
    (refused, *_) = moved(sessions, THREE, ONE, MALLORY)
    assert isinstance(refused, Send)
    assert isinstance(refused.message, Refused)
    assert_nothing_leaks(sessions, rows, MALLORY)
