"""The judge of all that arrives, driven by hand: no relay, no clock."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.bus.base import Listener
from shoal.bus.inbox import MAX_AGE_S, Inbox, Note, Unsealed
from shoal.bus.letters import letter_text, read_letter
from shoal.errors import BadMessage, BadProof
from shoal.identity import Identity, Mesh
from shoal.units import NodeId

from .nodes import AMBER, BIRCH, CLUB, SECRET_CLUB, Ear, announcement

NOW = int(time.time())
TEXT = announcement(BIRCH).encode().decode()


def inbox(mesh: Mesh = CLUB, now: Callable[[], float] = lambda: NOW) -> tuple[Inbox, Ear]:
    made, ear = Inbox(mesh, AMBER.node, now), Ear()
    made.listener = Listener(
        ear.announced.append, ear.gone.append, lambda *said: ear.sealed.append(said)
    )
    return made, ear


def note(content: str = TEXT, at: int = NOW, who: Identity = BIRCH) -> Note:
    return Note(who.node, at, None, (CLUB.topic,), content, lambda: True)


def test_a_good_announcement_is_handed_on() -> None:
    judge, ear = inbox()
    judge.announcement(note())
    assert ear.heard() == [(BIRCH.node, 1)]
    assert not judge.dropped


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("too large", note("x" * 30_000)),
        ("too old", note(at=NOW - 901)),
        ("from the future", note(at=NOW + 61)),
        ("expired", replace(note(), expires_at=NOW)),
        ("another topic", replace(note(), topics=("shoal/other",))),
        ("forged", replace(note(), is_genuine=lambda: False)),
        ("card of another node", note(announcement(AMBER).encode().decode())),
        ("bad_message", note("\ud800")),
    ],
)
def test_what_should_not_be_said_is_dropped(reason: str, bad: Note) -> None:
    judge, ear = inbox()
    judge.announcement(bad)
    assert judge.dropped == {reason: 1}
    assert ear.announced == []


def test_our_own_notes_are_not_news() -> None:
    judge, ear = inbox()
    judge.announcement(note(announcement(AMBER).encode().decode(), who=AMBER))
    judge.goodbye(note("", who=AMBER))
    assert (ear.announced, ear.gone, judge.dropped.total()) == ([], [], 0)


def said(sequence: int, at: int = NOW) -> Note:
    return note(announcement(BIRCH, sequence).encode().decode(), at=at)


def test_a_slow_relay_cannot_bring_back_what_was_overtaken() -> None:
    judge, ear = inbox()
    judge.announcement(said(7))
    judge.goodbye(note("7"))
    judge.announcement(said(7))
    judge.announcement(said(6))
    judge.goodbye(note("6"))
    assert (len(ear.announced), ear.gone) == (1, [BIRCH.node])
    assert judge.dropped == {"overtaken": 3}
    judge.announcement(said(8))
    assert len(ear.announced) == 2


def test_notes_that_were_dated_ahead_do_not_hide_those_after_a_correction() -> None:
    """An author whose clock is ahead finds out, and dates its next notes earlier."""
    judge, ear = inbox()
    judge.announcement(said(1, at=NOW + 50))
    judge.announcement(said(2, at=NOW))
    judge.goodbye(note("2", at=NOW))
    assert [each.sequence for each in ear.announced] == [1, 2]
    assert ear.gone == [BIRCH.node]


def test_what_came_too_early_or_too_late_by_a_wrong_clock_is_heard_after_its_correction() -> None:
    judge, ear = inbox(now=lambda: NOW - 200)
    others = [Identity.from_secret(bytes([number]) * 32) for number in range(4)]
    for other in others:
        judge.announcement(note(announcement(other).encode().decode(), who=other))
    assert [each.node for each in ear.announced] == [
        other.node for other in (others[2], *others[:2], others[3])
    ]
    assert judge.dropped == {"from the future": 2}


def test_an_author_that_has_lost_count_is_heard_again_when_all_old_notes_are_too_old() -> None:
    times = [float(NOW)]
    judge, ear = inbox(now=lambda: times[0])
    judge.announcement(said(9))
    times[0] += MAX_AGE_S - 1
    judge.announcement(said(1, at=int(times[0])))
    assert judge.dropped == {"overtaken": 1}
    times[0] += 2
    judge.announcement(said(1, at=int(times[0])))
    assert [each.sequence for each in ear.announced] == [9, 1]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "\u0663", "9" * 21, "soon"])
def test_a_goodbye_without_a_number_is_dropped(text: str) -> None:
    judge, ear = inbox()
    judge.goodbye(note(text))
    assert (ear.gone, judge.dropped) == ([], {"bad_message": 1})


def test_a_forger_cannot_use_up_anothers_allowance() -> None:
    judge, ear = inbox()
    for _ in range(200):
        judge.announcement(replace(note(), is_genuine=lambda: False))
    judge.announcement(note())
    assert len(ear.announced) == 1


def test_a_flood_costs_no_signature_checks() -> None:
    judge, _ = inbox()
    checked = 0

    def check() -> bool:
        nonlocal checked
        checked += 1
        return False

    for _ in range(10_000):
        judge.announcement(replace(note(), is_genuine=check))
    assert checked <= 4_000
    assert judge.dropped == {"forged": checked, "too many in all": 10_000 - checked}


def sealed(text: str, seal_id: str = "1") -> Unsealed:
    return Unsealed(BIRCH.node, seal_id, text)


def test_a_letter_is_read_once_and_in_time_only() -> None:
    times = [float(NOW)]
    judge, ear = inbox(now=lambda: times[0])
    wrap = replace(note("wrapped"), topics=())
    text = letter_text(CLUB, b"hello", NOW + 10)
    for seal_id in ("1", "1", "2"):
        judge.sealed(wrap, partial(sealed, text, seal_id))
    assert ear.sealed == [(BIRCH.node, b"hello")] * 2
    times[0] += 11
    judge.sealed(wrap, partial(sealed, text, "3"))
    assert judge.dropped == {"replayed": 1, "bad_message": 1}


def test_one_sender_cannot_send_all_the_time() -> None:
    judge, ear = inbox()
    text = letter_text(CLUB, b"hello", NOW + 10)
    for number in range(150):
        judge.sealed(note("wrapped"), partial(sealed, text, str(number)))
    assert len(ear.sealed) == 100
    assert judge.dropped == {"too many of one sender": 50}


def test_an_error_of_a_listener_is_not_the_peers() -> None:
    judge, _ = inbox()

    def broken(node: NodeId) -> None:
        raise BadProof("a bug of ours")

    judge.listener = Listener(on_gone=broken)
    with pytest.raises(BadProof):
        judge.goodbye(note("1"))
    assert not judge.dropped


def test_letters_between_meshes_are_not_read() -> None:
    with pytest.raises(BadMessage):
        read_letter(SECRET_CLUB, letter_text(CLUB, b"hello", NOW), NOW)
    assert read_letter(SECRET_CLUB, letter_text(SECRET_CLUB, b"hello", NOW), NOW) == b"hello"


@pytest.mark.parametrize("mesh", [CLUB, SECRET_CLUB])
def test_any_text_is_dropped_and_counted(mesh: Mesh) -> None:
    @settings(max_examples=50)
    @given(st.text(max_size=200) | st.binary(max_size=99).map(bytes.hex))
    def check(text: str) -> None:
        judge, ear = inbox(mesh)
        arrived = replace(note(text), topics=(mesh.topic,))
        judge.announcement(arrived)
        judge.sealed(arrived, partial(sealed, text))
        assert judge.dropped.total() == 2
        assert (ear.announced, ear.sealed) == ([], [])

    check()
