"""The loop around a stage: what the engine fails on costs one session, and time is kept."""

import asyncio
import threading
from collections.abc import Sequence

import msgspec
import pytest

from shoal.engine.batcher import Batcher
from shoal.engine.pace import SpeedMeter
from shoal.engine.prefix import page_digests
from shoal.engine.request import Sampling
from shoal.engine.rows import Row
from shoal.engine.stage import StepResult
from shoal.errors import BadMessage
from shoal.hardware import Speed
from shoal.pipeline import StageWorker
from shoal.pipeline.messages import (
    Close,
    Lost,
    Open,
    Opened,
    Preempted,
    Refused,
    RowEntry,
    Step,
    Tokens,
    pack_ids,
)
from shoal.units import NodeId, SessionId, Slice

from .hostile_node import (
    ALICE,
    BOB,
    CHECKPOINT,
    FIRST,
    MALLORY,
    ME,
    MIDDLE,
    PAGE,
    PAGES,
    WHOLE,
    HostileNode,
    hostile_node,
)

pytestmark = pytest.mark.anyio

ONE, TWO = (SessionId(digit * 16) for digit in "12")
PROMPT = tuple(range(1, 2 * PAGE + 5))
DIGESTS = page_digests(PROMPT, PAGE, b"")


def worker_of(node: HostileNode, layers: Slice) -> StageWorker:
    return next(each for each in node.pipeline.workers if each.key.layers == layers)


def whole(session: SessionId, **changed: object) -> Open:
    opened = Open(
        session, CHECKPOINT.model_id, "f32", WHOLE, ME, ME, len(PROMPT), len(PROMPT) + 4,
        sampling=Sampling(temperature=0, max_tokens=4), digests=len(DIGESTS),
        prefix_tokens=len(DIGESTS) * PAGE,
    )  # fmt: skip
    return msgspec.structs.replace(opened, **changed)


def body(ids: Sequence[int] = PROMPT, digests: Sequence[bytes] = DIGESTS) -> bytes:
    return b"".join(digests) + pack_ids(ids)


def middle(session: SessionId, known: int, born: int, **changed: object) -> Open:
    opened = Open(session, CHECKPOINT.model_id, "f32", MIDDLE, BOB, BOB, known, known, born=born)
    return msgspec.structs.replace(opened, **changed)


def first(session: SessionId, known: int, born: int) -> Open:
    return Open(
        session, CHECKPOINT.model_id, "f32", FIRST, BOB, BOB, known, known, born=born,
        patience_s=100.0,
    )  # fmt: skip


def first_token(node: HostileNode, gateway: NodeId) -> int:
    return node.links.to(gateway, Tokens)[0].entries[0].sampled.token


async def test_a_worker_keeps_the_batcher_that_it_is_given_though_it_is_still_empty() -> None:
    async with hostile_node() as node:
        known, speed = worker_of(node, WHOLE), Speed(step_s=1.0)
        given = Batcher(meter=SpeedMeter(8, speed))
        worker = StageWorker(
            known.key, known.sessions, known._stage, thread=known._computing._thread,
            links=known._outbox._links, emit=known._emit, clock=known._clock, batcher=given,
        )  # fmt: skip
        assert len(given) == 0
        assert worker.speed == speed


async def test_an_engine_error_of_any_kind_ends_only_the_session_whose_row_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hostile_node() as node:
        stage = worker_of(node, WHOLE)._stage
        compute = stage.step

        def step(rows: Sequence[Row]) -> StepResult:
            if any(row.session == ONE for row in rows):
                raise KeyError("a table has no such entry")
            return compute(rows)

        monkeypatch.setattr(stage, "step", step)
        node.receive(MALLORY, whole(ONE), body())
        node.receive(ALICE, whole(TWO), body())
        await node.until(lambda: node.links.to(ALICE, Tokens))
        assert [lost.session for lost in node.links.to(MALLORY, Lost)] == [ONE]
        assert node.links.to(ALICE, Lost) == []
        node.receive(ALICE, Close(TWO))
        assert worker_of(node, WHOLE).sessions.pool.used_fraction == 0


async def test_a_token_that_was_chosen_before_the_failure_is_not_chosen_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hostile_node() as node:
        stage = worker_of(node, WHOLE)._stage
        compute, calls = stage.step, 0

        def step(rows: Sequence[Row]) -> StepResult:
            nonlocal calls
            calls += 1
            compute(rows)
            raise RuntimeError("too late")

        monkeypatch.setattr(stage, "step", step)
        node.receive(MALLORY, whole(ONE), body())
        node.receive(ALICE, whole(TWO), body())
        await node.until(lambda: node.links.to(ALICE, Lost) and node.links.to(MALLORY, Lost))
        assert calls == 1
        assert worker_of(node, WHOLE).sessions.pool.used_fraction == 0


async def test_what_a_failed_forward_should_have_filled_is_found_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hostile_node() as node:
        worker = worker_of(node, WHOLE)

        def step(rows: Sequence[Row]) -> StepResult:
            raise RuntimeError("out of luck")

        with monkeypatch.context() as patch:
            patch.setattr(worker._stage, "step", step)
            node.receive(ALICE, whole(ONE), body())
            await node.until(lambda: node.links.to(ALICE, Lost))
        node.receive(ALICE, whole(TWO), body())
        assert node.links.to(ALICE, Opened)[-1].prefix_tokens == 0


async def test_a_second_session_begins_where_the_first_ones_pages_end() -> None:
    async with hostile_node() as node:
        node.receive(ALICE, whole(ONE), body())
        await node.until(lambda: node.links.to(ALICE, Tokens))
        node.receive(ALICE, Close(ONE))
        token = first_token(node, ALICE)
        node.links.sent.clear()
        node.receive(ALICE, whole(TWO), body())
        assert node.links.to(ALICE, Opened)[0].prefix_tokens == 2 * PAGE
        await node.until(lambda: node.links.to(ALICE, Tokens))
        assert first_token(node, ALICE) == token
        node.links.sent.clear()
        node.receive(MALLORY, whole(ONE), body())
        assert node.links.to(MALLORY, Opened)[0].prefix_tokens == 0


async def test_digests_that_are_none_cost_the_sender_its_link() -> None:
    async with hostile_node() as node:
        for message, wrong in (
            (whole(ONE), b"short"),
            (whole(ONE), body(digests=())),
            (Close(ONE), b"short"),
        ):
            with pytest.raises(BadMessage):
                node.receive(MALLORY, message, wrong)
        assert not any(len(each.sessions) for each in node.pipeline.workers)


async def test_a_shorter_patience_rings_before_a_longer_one() -> None:
    async with hostile_node() as node:
        worker = worker_of(node, MIDDLE)
        node.receive(ALICE, middle(ONE, PAGES * PAGE, born=1))
        node.receive(ALICE, middle(TWO, PAGE, born=2, patience_s=100.0))
        assert worker._timer is not None
        late = worker._timer.when()
        node.receive(ALICE, middle(SessionId("3" * 16), PAGE, born=3, patience_s=1.0))
        assert worker._timer.when() < late - 90


async def test_a_row_without_pages_is_computed_once_the_youngest_has_made_room() -> None:
    async with hostile_node() as node:
        worker = worker_of(node, MIDDLE)
        all_tokens, row_tokens = PAGES * PAGE, 128
        node.receive(ALICE, middle(ONE, 15 * PAGE, 1, next=ALICE, reserve_tokens=all_tokens))
        node.receive(ALICE, middle(TWO, 13 * PAGE, 2, next=ALICE))
        assert worker.sessions.pool.used_fraction == 1.0
        for start in range(0, all_tokens, row_tokens):
            hidden = bytes(row_tokens * CHECKPOINT.hidden_size * 4)
            node.receive(BOB, Step((RowEntry(ONE, start, row_tokens),)), hidden)
        await node.until(lambda: len(node.links.to(ALICE, Step)) == all_tokens // row_tokens)
        assert [told.session for told in node.links.to(ALICE, Preempted)] == [TWO]
        assert worker.sessions.ids() == [ONE]


async def test_a_session_may_be_closed_while_hidden_states_of_others_are_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was let in, by the pages of a third, in the step whose results are still to be sent."""
    three = SessionId("3" * 16)
    async with hostile_node() as node:
        worker = node.serve(FIRST)
        stage, computing, sending = worker._stage, threading.Event(), threading.Event()
        compute, to_wire = stage.step, stage.hidden_to_wire

        def step(rows: Sequence[Row]) -> StepResult:
            computing.wait(5)
            return compute(rows)

        def hidden_to_wire(
            result: StepResult, rows: Sequence[Row], chosen: Sequence[int]
        ) -> memoryview:
            sending.wait(5)
            return to_wire(result, rows, chosen)

        monkeypatch.setattr(stage, "step", step)
        monkeypatch.setattr(stage, "hidden_to_wire", hidden_to_wire)
        for session in (ONE, TWO):
            node.receive(ALICE, first(session, 20, 1), pack_ids(range(20)))
        node.receive(ALICE, first(three, 29 * PAGE, 2), pack_ids([1] * 29 * PAGE))
        for _ in range(3):
            await asyncio.sleep(0)
        node.receive(ALICE, Close(ONE))
        computing.set()
        async with asyncio.timeout(5):
            while worker.sessions._sessions[three].state == "waiting":
                await asyncio.sleep(0.01)
        node.receive(ALICE, Close(three))
        sending.set()
        await node.until(lambda: node.links.to(BOB, Step))
        assert worker.sessions.ids() == [TWO]
        node.receive(ALICE, first(three, 20, 3), pack_ids(range(20)))
        await node.until(lambda: len(node.links.to(BOB, Step)) == 2)


async def test_an_engine_that_hangs_gives_its_sessions_back_and_takes_none_until_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.pipeline.computing.HUNG_S", 0.2)
    monkeypatch.setattr("shoal.pipeline.computing.HUNG_TIMES", 0.0)
    async with hostile_node() as node:
        worker, hanging = worker_of(node, WHOLE), threading.Event()
        compute = worker._stage.step

        def step(rows: Sequence[Row]) -> StepResult:
            hanging.wait(5)
            return compute(rows)

        with monkeypatch.context() as patch:
            patch.setattr(worker._stage, "step", step)
            node.receive(ALICE, whole(ONE), body())
            async with asyncio.timeout(5):
                while not node.links.to(ALICE, Lost):
                    await asyncio.sleep(0.01)
            (lost,) = node.links.to(ALICE, Lost)
            assert not lost.kept
            node.receive(MALLORY, whole(TWO), body())
            assert [each.reason for each in node.links.to(MALLORY, Refused)] == ["gone"]
            hanging.set()
            await node.until(lambda: not worker.hung)
        assert worker.sessions.pool.used_fraction == 0
        node.receive(MALLORY, whole(TWO), body())
        await node.until(lambda: node.links.to(MALLORY, Tokens))


async def test_who_waits_for_its_turn_in_the_engine_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.pipeline.computing.HUNG_S", 0.1)
    monkeypatch.setattr("shoal.pipeline.computing.HUNG_TIMES", 0.0)
    async with hostile_node() as node:
        loading = threading.Event()
        task = asyncio.ensure_future(node.thread.run(loading.wait, 5))
        await asyncio.sleep(0)
        node.receive(ALICE, whole(ONE), body())
        await asyncio.sleep(0.3)
        assert not node.links.to(ALICE, Lost)
        loading.set()
        await task
        await node.until(lambda: node.links.to(ALICE, Tokens))
