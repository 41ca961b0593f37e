"""What a stranger with a valid link can send: the node lives, only the sender pays, and every page
comes back.
"""

import asyncio
import math
import struct
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.draft import MAX_DRAFT
from shoal.engine.request import Sampled, Sampling, TokenLogprob
from shoal.errors import BadMessage, LinkClosed, Overloaded, PeerError, PromptTooLong, StageLost
from shoal.pipeline import Plan, Request, Stop, Wish
from shoal.pipeline.messages import (
    CHANNEL,
    Close,
    Go,
    Leaving,
    Load,
    Lost,
    Open,
    Opened,
    Preempted,
    Refused,
    Resume,
    RowEntry,
    Step,
    TokenEntry,
    Tokens,
    from_frame,
    pack_ids,
    to_frame,
)
from shoal.pipeline.stage import StageSessionsConfig
from shoal.transport import Frame
from shoal.units import ModelId, NodeId, SessionId, Slice

from .hostile_node import (
    ALICE,
    BOB,
    CHECKPOINT,
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

MODEL, WIDTH = CHECKPOINT.model_id, CHECKPOINT.hidden_size
ONE, TWO, THREE = (SessionId(digit * 16) for digit in "123")
GREEDY = Sampling(temperature=0, max_tokens=4)


def whole(session: SessionId, ids: Sequence[int] = (1, 2, 3), **changed: object) -> Open:
    """An honest Open of the whole model for a ring of one stage."""
    opened = Open(session, MODEL, "f32", WHOLE, ME, ME, len(ids), len(ids) + 4, sampling=GREEDY)
    return msgspec.structs.replace(opened, **changed)


def middle(session: SessionId, **changed: object) -> Open:
    opened = Open(session, MODEL, "f32", MIDDLE, MALLORY, MALLORY, 8, 64)
    return msgspec.structs.replace(opened, **changed)


def rows(count: int, value: float = 0.0) -> bytes:
    """The hidden states of so many tokens."""
    return struct.pack("<f", value) * (count * WIDTH)


def pages_used(node: HostileNode) -> float:
    return sum(worker.sessions.pool.used_fraction for worker in node.pipeline.workers)


async def answer(node: HostileNode, gateway: NodeId = ALICE) -> list[int]:
    """An honest session from its Open to its Close."""
    already = len(node.links.to(gateway, Tokens))
    node.receive(gateway, whole(THREE), pack_ids((1, 2, 3)))

    def entries() -> list[TokenEntry]:
        return [e for t in node.links.to(gateway, Tokens)[already:] for e in t.entries]

    own = len(node.links.to(ME, Tokens))
    while not (entries() and entries()[-1].sampled.finish):
        await node.settle()
        for tokens in node.links.to(ME, Tokens)[own:]:  # the link to ourselves
            own += 1
            node.receive(ME, tokens)
    node.receive(gateway, Close(THREE))
    return [entry.sampled.token for entry in entries()]


# ---- anything at all

node_ids = st.sampled_from([ME, MALLORY, ALICE, BOB])
session_ids = st.sampled_from([ONE, TWO])
counts = st.one_of(st.integers(0, 40), st.integers(0, 1 << 31))
texts = st.text(max_size=20)
tokens = st.builds(
    Sampled,
    st.one_of(st.integers(0, 5), st.integers(0, (1 << 32) - 1)),
    st.sampled_from(["", "stop"]),
)


@st.composite
def opens(draw: st.DrawFn) -> Open:
    known = draw(st.integers(1, 40))
    return Open(
        session=draw(session_ids),
        model=draw(st.sampled_from([MODEL, ModelId("other")])),
        compute="f32",
        layers=draw(st.sampled_from([WHOLE, MIDDLE, Slice(0, 9)])),
        previous=draw(node_ids),
        next=draw(node_ids),
        known_tokens=known,
        reserve_tokens=known + draw(st.one_of(st.integers(0, 300), st.integers(0, 1 << 30))),
        output_tokens=draw(st.integers(0, known)),
        sampling=draw(st.sampled_from([None, GREEDY, Sampling(seed=1, repetition_penalty=2.0)])),
        patience_s=draw(st.sampled_from([0.0, 1.0, 1e300])),
        born=draw(st.integers(0, 3)),
        page_tokens=PAGE,
        digests=draw(st.integers(0, (known - 1) // PAGE)),
        prefix_tokens=draw(counts),
        hold=draw(st.booleans()),
    )


@st.composite
def resumes(draw: st.DrawFn) -> Resume:
    known = draw(st.integers(1, 60))
    session = draw(session_ids)
    return Resume(
        session=session,
        renamed=ONE if session == TWO else TWO,
        known_tokens=known,
        output_tokens=draw(st.integers(0, known)),
        previous=draw(node_ids),
        next=draw(node_ids),
    )


row_entries = st.one_of(
    st.builds(RowEntry, session_ids, counts, st.integers(1, 40)),
    st.builds(
        lambda session, start, draft: RowEntry(session, start, 1 + len(draft), tuple(draft)),
        session_ids,
        counts,
        st.lists(st.integers(0, (1 << 32) - 1), max_size=MAX_DRAFT),
    ),
)
token_entries = st.builds(
    TokenEntry, session_ids, counts, tokens, st.lists(tokens, max_size=3).map(tuple)
)
messages = st.one_of(
    opens(),
    opens(),
    st.builds(Close, session_ids),
    st.builds(Opened, session_ids),
    st.builds(Preempted, session_ids),
    st.builds(Lost, session_ids, node_ids, texts, st.booleans()),
    st.builds(Leaving, session_ids),
    resumes(),
    st.builds(Go, session_ids, counts, st.booleans()),
    st.builds(Refused, session_ids, st.sampled_from(["busy", "never", "gone"]), texts),
    token_entries.map(lambda entry: Tokens((entry,))),
    st.lists(row_entries, min_size=1, max_size=4).map(lambda entries: Step(tuple(entries))),
)


def body_for(message: object, chance: int) -> bytes:
    """Mostly what belongs to it, so that the attack comes further than the door."""
    if chance == 0:
        return b"\x01\x02\x03"
    match message:
        case Open(known_tokens=known, output_tokens=output, digests=digests):
            return b"d" * 16 * digests + pack_ids([7] * (known if chance < 8 else output))
        case Resume(known_tokens=known, output_tokens=output):
            return pack_ids([7] * (known if chance < 5 else output))
        case Close():
            return b"d" * 16 * chance
        case Step(entries):
            return rows(sum(entry.count for entry in entries), math.nan if chance > 8 else 0.5)
    return b""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(node_ids, messages, st.integers(0, 9), st.booleans()), max_size=25))
def test_no_sequence_of_messages_hurts_the_node(
    sent: list[tuple[NodeId, object, int, bool]],
) -> None:
    async def attack() -> None:
        async with hostile_node() as node:
            for sender, message, chance, reads in sent:
                (node.links.full.discard if reads else node.links.full.add)(sender)
                try:
                    node.pipeline.receive(sender, to_frame(message, body_for(message, chance)))
                except PeerError:
                    node.pipeline.node_lost(sender, "it misbehaved")
                if chance % 3 == 0:
                    await node.settle()
            node.links.full.clear()
            for each in (ME, MALLORY, ALICE, BOB):
                node.pipeline.node_lost(each, "gone")
            await node.settle()  # what could not be sent is noticed a turn later
            await node.until(lambda: not pages_used(node))
            assert not any(worker.sessions.ids() for worker in node.pipeline.workers)
            assert len(await answer(node)) == 4

    asyncio.run(attack())


@settings(max_examples=150)
@given(st.binary(max_size=200), st.binary(max_size=40))
def test_random_headers_are_the_senders_fault(header: bytes, body: bytes) -> None:
    with pytest.raises(BadMessage):
        from_frame(Frame(CHANNEL, header, body))


json_like = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(),
        texts,
        st.binary(max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
fields = [
    *{field for kind in (Open, Refused, Step, Tokens, Lost) for field in kind.__struct_fields__}
]


@settings(max_examples=300)
@given(
    st.sampled_from(
        [
            whole(ONE),
            middle(ONE),
            Close(ONE),
            Lost(ONE, BOB, ""),
            Refused(ONE, "gone", ""),
            Step((RowEntry(ONE, 0, 1),)),
            Tokens((TokenEntry(ONE, 0, Sampled(1)),)),
        ]
    ),
    st.dictionaries(st.sampled_from(fields), json_like, max_size=3),
)
def test_fields_of_any_kind_decode_or_are_the_senders_fault(message: object, wild: dict) -> None:
    document = {**msgspec.msgpack.decode(msgspec.msgpack.encode(message)), **wild}
    try:
        decoded = from_frame(Frame(CHANNEL, msgspec.msgpack.encode(document)))
    except BadMessage:
        return
    assert len(to_frame(decoded).header) < 4096


@pytest.mark.parametrize(
    "message",
    [
        Close(SessionId("x" * 60_000)),
        Close(SessionId("\x1b[2J" + "0" * 12)),
        Lost(ONE, BOB, "x" * 301),
        Lost(ONE, NodeId("n" * 63), ""),
        Step((RowEntry(ONE, 0, 0),)),
        Step((RowEntry(ONE, -1, 1),)),
        Step((RowEntry(ONE, 0, 513),)),
        Tokens((TokenEntry(ONE, 0, Sampled(-1)),)),
        Tokens((TokenEntry(ONE, 0, Sampled(1 << 32)),)),
        Tokens((TokenEntry(ONE, 0, Sampled(1, "because")),)),  # type: ignore[arg-type]
        Tokens((TokenEntry(ONE, 0, Sampled(1, "", 0.0, (TokenLogprob(1, 0.0),) * 21)),)),
        Tokens((TokenEntry(ONE, 0, Sampled(1)),) * 4097),
        Tokens((TokenEntry(ONE, 0, Sampled(1), (Sampled(1),) * (MAX_DRAFT + 1)),)),
        Step((RowEntry(ONE, 0, 2 + MAX_DRAFT, (1,) * (MAX_DRAFT + 1)),)),
    ],
)
def test_what_is_out_of_bounds_never_reaches_a_session(message: object) -> None:
    with pytest.raises(BadMessage):
        from_frame(to_frame(message))


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_patience_is_a_time_and_a_logprob_a_number(number: float) -> None:
    document = msgspec.msgpack.decode(to_frame(whole(ONE)).header) | {"patience_s": number}
    with pytest.raises(BadMessage):
        from_frame(Frame(CHANNEL, msgspec.msgpack.encode(document)))
    if number != -1.0:
        with pytest.raises(ValueError, match="logprob"):
            Sampled(1, "", number)


# ---- against the worker


async def test_a_gateway_that_takes_no_answer_ends_its_session_and_not_the_worker() -> None:
    async with hostile_node() as node:
        node.links.full.add(MALLORY)
        node.receive(MALLORY, whole(ONE), pack_ids((1, 2, 3)))
        await node.settle()
        assert pages_used(node) == 0
        assert len(await answer(node)) == 4


async def test_a_next_hop_that_leaves_in_the_middle_costs_only_its_session_a_moment() -> None:
    async with hostile_node() as node:
        node.receive(MALLORY, middle(ONE, next=BOB))
        node.links.draining[BOB] = asyncio.get_running_loop().create_future()
        node.receive(MALLORY, Step((RowEntry(ONE, 0, 2),)), rows(2))
        await node.until(lambda: node.links.to(BOB, Step))
        node.links.draining[BOB].set_exception(LinkClosed("gone"))
        await node.until(lambda: node.links.to(MALLORY, Lost))
        assert node.links.to(MALLORY, Lost) == [Lost(ONE, BOB, "gone", kept=True)]
        assert pages_used(node) > 0
        node.receive(MALLORY, Close(ONE))
        assert pages_used(node) == 0
        assert len(await answer(node)) == 4


async def test_rows_that_are_amiss_cost_their_sender_the_session_and_not_what_is_there() -> None:
    async with hostile_node() as node:
        node.receive(MALLORY, middle(ONE))
        node.receive(MALLORY, Step((RowEntry(ONE, 0, 2),)), rows(2))
        node.receive(MALLORY, Step((RowEntry(ONE, 4, 1),)), rows(1))
        (lost,) = node.links.to(MALLORY, Lost)
        assert lost.kept
        assert lost.node == MALLORY
        assert pages_used(node) > 0  # its gateway may have others send what is missing
        node.receive(MALLORY, Close(ONE))
        await node.until(lambda: pages_used(node) == 0)


async def test_a_next_hop_that_does_not_read_holds_up_nobody_else() -> None:
    async with hostile_node() as node:
        node.links.draining[BOB] = asyncio.get_running_loop().create_future()
        node.receive(MALLORY, middle(ONE, next=BOB))
        node.receive(MALLORY, middle(TWO, next=ALICE))
        node.receive(MALLORY, Step((RowEntry(ONE, 0, 2),)), rows(2))
        await node.until(lambda: node.links.to(BOB, Step))
        node.receive(MALLORY, Step((RowEntry(ONE, 2, 2),)), rows(2))
        node.receive(MALLORY, Step((RowEntry(TWO, 0, 2),)), rows(2))
        await node.until(lambda: node.links.to(ALICE, Step))
        assert len(node.links.to(BOB, Step)) == 1
        node.links.draining[BOB].set_result(None)
        await node.until(lambda: len(node.links.to(BOB, Step)) == 2)


async def test_a_dial_that_fails_after_its_session_was_opened_anew_leaks_no_pages() -> None:
    async with hostile_node() as node:
        node.links.connecting[BOB] = asyncio.get_running_loop().create_future()
        node.receive(MALLORY, middle(ONE, next=BOB))
        await node.settle()
        node.receive(MALLORY, Close(ONE))
        node.receive(MALLORY, middle(ONE, next=ALICE))
        assert pages_used(node) > 0
        node.links.connecting.pop(BOB).set_exception(LinkClosed("unreachable"))
        await node.settle()
        node.receive(MALLORY, Close(ONE))
        assert pages_used(node) == 0


async def test_rows_of_nan_and_infinity_harm_no_other_session() -> None:
    async with hostile_node() as node:
        clean = await answer(node)
        for value in (math.nan, math.inf, -3e38):
            node.receive(MALLORY, middle(ONE))
            node.receive(MALLORY, Step((RowEntry(ONE, 0, 8),)), rows(8, value))
            assert await answer(node) == clean
            node.receive(MALLORY, Close(ONE))
        assert await answer(node) == clean


async def test_a_small_row_does_not_keep_its_large_frame_in_memory() -> None:
    async with hostile_node() as node:
        worker = next(each for each in node.pipeline.workers if each.key.layers == MIDDLE)
        node.receive(MALLORY, middle(ONE))
        frame = bytearray(rows(501))
        step = Step((RowEntry(ONE, 0, 1), RowEntry(TWO, 0, 500)))
        node.pipeline.receive(MALLORY, Frame(CHANNEL, to_frame(step).header, frame))
        (row,) = worker._batcher.take()
        assert row.wire is not None
        assert len(row.wire.obj) == WIDTH * 4


# ---- against the pages


async def test_what_can_never_fit_is_refused_before_anything_is_kept() -> None:
    async with hostile_node() as node:
        for tokens_wanted in (PAGES * PAGE + 1, CHECKPOINT.context_length + 1, 1 << 31):
            node.receive(
                MALLORY, middle(ONE, reserve_tokens=tokens_wanted, patience_s=100.0, next=BOB)
            )
            assert node.links.to(MALLORY, Refused)[-1].reason == "never"
        node.receive(MALLORY, whole(ONE, (1 << 31,)), pack_ids((1 << 31,)))
        assert node.links.to(MALLORY, Refused)[-1].reason == "never"
        assert not any(len(worker.sessions) for worker in node.pipeline.workers)


async def test_a_silent_gateway_does_not_keep_its_pages() -> None:
    async with hostile_node(StageSessionsConfig(idle_s=600.0)) as node:
        worker = next(each for each in node.pipeline.workers if each.key.layers == MIDDLE)
        node.receive(MALLORY, middle(ONE))
        node.now = 599.0
        worker._end_idle()
        assert pages_used(node) > 0
        node.now = 601.0
        worker._end_idle()
        assert pages_used(node) == 0
        assert node.links.to(MALLORY, Lost)[-1].session == ONE


async def test_one_gateway_leaves_pages_and_sessions_to_the_others() -> None:
    config = StageSessionsConfig(gateway_share=0.5, max_sessions=8)
    async with hostile_node(config) as node:
        most = PAGES * PAGE
        quarter = {"known_tokens": most // 4, "reserve_tokens": most // 4}
        for number in range(9):
            node.receive(MALLORY, middle(SessionId(f"{number:016x}"), **quarter))
        assert pages_used(node) == 0.5
        assert {refused.reason for refused in node.links.to(MALLORY, Refused)} == {"busy"}
        node.receive(ALICE, middle(ONE, **quarter))
        assert node.links.to(ALICE, Opened)
        node.pipeline.node_lost(MALLORY, "gone")
        node.pipeline.node_lost(ALICE, "gone")
        all_of_it = middle(ONE, known_tokens=most, reserve_tokens=most)
        node.receive(MALLORY, all_of_it)  # while nobody else is here
        assert pages_used(node) == 1.0


# ---- against other people's sessions, and other people's standing


async def test_only_its_gateway_closes_a_session_and_only_its_neighbours_are_heard() -> None:
    async with hostile_node() as node:
        node.receive(ALICE, middle(ONE, previous=BOB, next=ALICE))
        node.receive(MALLORY, Close(ONE))
        node.receive(MALLORY, Step((RowEntry(ONE, 0, 1),)), rows(1))
        node.receive(MALLORY, Step((RowEntry(ONE, 5, 1),)), b"nonsense")
        node.receive(MALLORY, Tokens((TokenEntry(ONE, 0, Sampled(1)),)))
        await node.settle()
        assert pages_used(node) > 0
        assert not node.links.to(ALICE, Step)


@pytest.mark.parametrize(
    ("step", "body"),
    [
        (Step((RowEntry(ONE, 5, 1),)), rows(1)),  # opened anew at the sender, not here
        (Step((RowEntry(ONE, 0, 300),)), rows(300)),  # reserved more at the sender than here
        (Step((RowEntry(ONE, 0, 1),)), rows(1)[:-2]),  # the sender has another model or type
    ],
)
async def test_a_gateway_cannot_make_two_honest_stages_quarrel(step: Step, body: bytes) -> None:
    """Bob computes what Mallory told him to: it does not fit here, and it is not Bob's fault."""
    async with hostile_node() as node:
        node.receive(MALLORY, middle(ONE, previous=BOB))
        node.receive(BOB, step, body)
        assert node.links.to(MALLORY, Lost)[-1].node == BOB
        assert pages_used(node) == 0


async def test_tokens_that_do_not_fit_end_the_session_and_not_the_link() -> None:
    for entry in (TokenEntry(ONE, 9, Sampled(1)), TokenEntry(ONE, 0, Sampled(1 << 31))):
        async with hostile_node() as node:
            node.receive(MALLORY, whole(ONE, previous=BOB, next=BOB), pack_ids((1, 2, 3)))
            node.receive(BOB, Tokens((entry,)))
            assert node.links.to(MALLORY, Lost)[-1].node == BOB


async def test_a_session_id_that_a_stranger_took_does_not_cost_the_gateway_its_link() -> None:
    async with hostile_node() as node:
        node.receive(MALLORY, middle(ONE))
        for honest in (middle(ONE), whole(ONE)):
            node.receive(ALICE, honest, pack_ids((1, 2, 3)) if honest.sampling else b"")
            assert node.links.to(ALICE, Refused)[-1].reason == "gone"
        with pytest.raises(BadMessage, match="already open"):
            node.receive(MALLORY, middle(ONE))


# ---- against the gateway


def asked(node: HostileNode, max_tokens: int = 3):
    stops = (Stop(BOB, Slice(0, 4)), Stop(MALLORY, Slice(4, 8)))
    node.plan = Plan(MODEL, "f32", stops, CHECKPOINT.vocab_size)
    return node.pipeline.gateway.generate(Request("m", (1, 2), Sampling(max_tokens=max_tokens)))


def run_to_tokens(node: HostileNode, max_tokens: int = 3):
    stream = asked(node, max_tokens)
    assert stream.live is not None
    node.receive(MALLORY, Opened(stream.live))
    node.receive(BOB, Opened(stream.live))
    assert stream.generation.state == "running"
    return stream


async def test_a_last_stage_that_never_ends_does_not_get_more_than_was_asked_for() -> None:
    async with hostile_node() as node:
        stream = run_to_tokens(node)
        session = stream.live
        for index in range(50):
            node.receive(MALLORY, Tokens((TokenEntry(session, index, Sampled(5)),)))
        got = [sampled async for sampled in stream]
        assert [sampled.finish for sampled in got] == ["", "", "length"]
        assert node.links.to(MALLORY, Close)
        assert node.links.to(BOB, Close)


async def test_a_token_that_does_not_exist_is_not_delivered() -> None:
    async with hostile_node() as node:
        stream = run_to_tokens(node)
        token = Sampled(CHECKPOINT.vocab_size)
        node.receive(MALLORY, Tokens((TokenEntry(stream.live, 0, token),)))
        with pytest.raises(StageLost, match="does not exist"):
            [sampled async for sampled in stream]


@pytest.mark.parametrize("index", [0, 2])
async def test_a_token_out_of_turn_ends_the_trust_in_who_chose_it(index: int) -> None:
    """Else it could be shifted until it is taken for the next one."""
    async with hostile_node() as node:
        stream = run_to_tokens(node)
        for at in (0, index):
            node.receive(MALLORY, Tokens((TokenEntry(stream.live, at, Sampled(1)),)))
        assert MALLORY in stream.generation.avoid
        assert stream.generation.output == [1]
        await stream.aclose()


async def test_what_comes_from_a_stage_after_its_fault_is_not_taken_for_the_next_token() -> None:
    async with hostile_node() as node:
        stream = run_to_tokens(node)
        generation, session = stream.generation, stream.live
        node.receive(MALLORY, Tokens((TokenEntry(session, 0, Sampled(1)),)))
        generation.token(TokenEntry(session, 2, Sampled(3)), MALLORY)
        generation.token(TokenEntry(generation.session or session, 1, Sampled(3)), MALLORY)
        assert generation.output == [1]
        await stream.aclose()


async def test_a_stage_that_was_opened_too_late_is_closed_again() -> None:
    """While a link is made an Open waits for it, and a Close is not sent at all."""
    async with hostile_node() as node:
        stream = asked(node)
        session = stream.live
        node.links.unknown.add(BOB)
        await stream.aclose()
        node.links.unknown.remove(BOB)
        assert not node.links.to(BOB, Close)
        node.receive(BOB, Opened(session))
        assert node.links.to(BOB, Close) == [Close(session)]


async def test_chatter_does_not_keep_a_stalled_generation_alive() -> None:
    async with hostile_node() as node:
        stream = run_to_tokens(node)
        before = stream.progress
        node.now = 100.0
        node.receive(MALLORY, Opened(stream.live))
        node.receive(ALICE, Tokens((TokenEntry(stream.live, 0, Sampled(1)),)))
        assert stream.progress == before
        node.receive(MALLORY, Tokens((TokenEntry(stream.live, 0, Sampled(1)),)))
        assert stream.progress == 100.0
        await stream.aclose()


@pytest.mark.parametrize("reason", ["never", "busy"])
async def test_a_refusal_costs_one_route_and_not_the_request(reason: str) -> None:
    async with hostile_node() as node:
        stream = asked(node)
        for _ in range(2):  # a busy stage is asked a second time, with patience
            node.receive(MALLORY, Refused(stream.live, reason, "no \x1b[31mroom"))
            if reason == "never":
                break
        with pytest.raises((PromptTooLong, Overloaded), match=r"no \[31mroom"):
            await stream.opened()
        assert MALLORY in stream.generation.avoid


async def test_a_stranger_who_knows_the_session_changes_nothing_at_the_gateway() -> None:
    async with hostile_node() as node:
        stream = asked(node)
        for message in (
            Opened(stream.live),
            Refused(stream.live, "never", ""),
            Lost(stream.live, BOB, ""),
            Preempted(stream.live),
            Tokens((TokenEntry(stream.live, 0, Sampled(1)),)),
        ):
            node.receive(ALICE, message)
        assert stream.generation.state == "opening"
        assert stream.generation.attempt == 1
        await stream.aclose()


async def test_only_its_gateway_moves_a_session_to_another_route() -> None:
    async with hostile_node() as node:
        worker = next(each for each in node.pipeline.workers if each.key.layers == MIDDLE)
        node.receive(ALICE, middle(ONE, previous=BOB, next=BOB))
        resume = Resume(ONE, TWO, 8, 0, MALLORY, MALLORY)
        node.receive(MALLORY, resume)
        assert [each.reason for each in node.links.to(MALLORY, Refused)] == ["gone"]
        assert worker.sessions.ids() == [ONE]
        node.receive(ALICE, msgspec.structs.replace(resume, previous=BOB, next=BOB, known_tokens=8))
        node.receive(MALLORY, Go(TWO))
        assert worker.sessions._sessions[TWO].state == "held"


@pytest.mark.parametrize("known", [1, 1 << 20], ids=["less than before", "more than it reserved"])
async def test_who_forgets_what_it_knew_is_at_fault(known: int) -> None:
    async with hostile_node() as node:
        node.receive(ALICE, middle(ONE))
        with pytest.raises(BadMessage):
            node.receive(ALICE, Resume(ONE, TWO, known, 0, BOB, BOB))


async def test_rows_before_go_are_bounded() -> None:
    async with hostile_node() as node:
        node.receive(MALLORY, middle(ONE, previous=BOB, next=BOB, hold=True))
        for _ in range(100):
            node.receive(BOB, Step((RowEntry(ONE, 0, 8),)), rows(8))
        assert [each.message for each in node.links.to(MALLORY, Lost)] == [
            "more rows than it has tokens"
        ]
        assert pages_used(node) == 0


async def test_who_leaves_and_leaves_gets_one_look_for_another_route() -> None:
    async with hostile_node() as node:
        stream = run_to_tokens(node)
        looked, plan = [], node.pipeline.gateway._planner

        def counted(wish: Wish) -> Plan:
            looked.append(wish)
            return plan(wish)

        node.pipeline.gateway._planner = counted
        for _ in range(100):
            node.receive(MALLORY, Leaving(stream.live))
            node.receive(BOB, Leaving(stream.live))
        assert len(looked) == 4  # for each of them around what is kept, and anew
        await stream.aclose()


async def test_a_stranger_says_nothing_about_load() -> None:
    async with hostile_node() as node:
        stream = run_to_tokens(node)
        heard: list[NodeId] = []
        node.pipeline.gateway._on_load = lambda who, model, load: heard.append(who)
        for who in (ALICE, MALLORY):
            node.receive(who, Opened(stream.live, load=Load(1, 2, 3)))
        assert heard == [MALLORY]
        await stream.aclose()
