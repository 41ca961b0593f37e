"""Who counts as dead, and what liars can do."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.bus.announcement import MAX_HINTS, Loss
from shoal.bus.doubts import ANSWER_S, ENOUGH, MUTE_S, REFUTE_S, WITNESSES, Doubts
from shoal.units import NodeId

ME, VICTIM = NodeId("me"), NodeId("victim")
OTHERS = [NodeId(f"other{n}") for n in range(6)]
LATE = REFUTE_S + 0.1


class Place:
    """Doubts about nodes whose newest announcement has the sequence in `known`."""

    def __init__(self) -> None:
        self.known: dict[NodeId, int] = {VICTIM: 7, **dict.fromkeys(OTHERS, 1)}
        self.doubts = Doubts(ME, self.known.get)

    def name(self, *announcers: NodeId, sequence: int = 7, now: float = 0.0) -> None:
        for announcer in announcers:
            self.doubts.said(announcer, (Loss(VICTIM, sequence),), now)

    def gone(self, now: float) -> list[NodeId]:
        return self.doubts.verdicts(now, members=1000).gone


def test_one_who_is_named_is_doubtful_until_it_announces_itself_anew() -> None:
    place = Place()
    place.name(OTHERS[0])
    assert place.doubts.doubtful == {VICTIM}
    place.known[VICTIM] = 8
    place.doubts.heard(VICTIM, 8, 1.0)
    assert place.doubts.doubtful == frozenset()
    assert place.gone(100.0) == []


def test_several_who_name_a_node_make_it_gone_after_it_had_time_to_refute() -> None:
    place = Place()
    place.name(*OTHERS[:ENOUGH])
    assert place.gone(REFUTE_S / 2) == []
    assert place.doubts.due == REFUTE_S
    assert place.gone(LATE) == [VICTIM]


@given(st.floats(0.0, 1e9))
def test_when_verdicts_are_due_there_is_one(now: float) -> None:
    place = Place()
    place.name(*OTHERS[:ENOUGH], now=now)
    due = place.doubts.due
    assert due is not None
    assert place.gone(due) == [VICTIM]


def test_what_we_found_ourselves_needs_no_other() -> None:
    place = Place()
    assert place.doubts.lost(VICTIM, 0.0, until=120.0)
    assert not place.doubts.lost(VICTIM, 1.0, until=120.0)
    assert place.doubts.ours(1.0) == (Loss(VICTIM, 7),)
    assert place.gone(LATE) == [VICTIM]
    assert place.doubts.ours(121.0) == ()


def test_we_do_not_name_whom_we_never_heard_of() -> None:
    place = Place()
    assert not place.doubts.lost(NodeId("stranger"), 0.0, until=9.0)
    assert place.doubts.ours(0.0) == ()


def test_a_loss_of_an_older_announcement_or_of_a_future_one_means_nothing() -> None:
    place = Place()
    for sequence in (6, 8, 1 << 53):
        place.name(*OTHERS, sequence=sequence)
        assert place.doubts.doubtful == frozenset()
        assert place.gone(LATE) == []


def test_one_liar_removes_nobody_however_often_it_speaks() -> None:
    place = Place()
    for turn in range(200):
        place.name(OTHERS[0], now=turn * 1.0)
        assert place.gone(turn + LATE) == []


def test_a_liar_that_was_refuted_is_not_believed_about_that_node_for_a_while() -> None:
    place = Place()
    place.name(OTHERS[0], now=0.0)
    place.known[VICTIM] = 8
    place.doubts.heard(VICTIM, 8, 1.0)
    place.name(OTHERS[0], sequence=8, now=2.0)
    assert place.doubts.doubtful == frozenset()
    place.name(OTHERS[1], sequence=8, now=3.0)
    assert place.doubts.doubtful == {VICTIM}
    place.known[VICTIM] = 9
    place.doubts.heard(VICTIM, 9, 4.0)
    place.name(OTHERS[0], sequence=9, now=1.0 + MUTE_S + 1)
    assert place.doubts.doubtful == {VICTIM}


def test_a_loss_that_is_taken_back_or_whose_announcer_left_does_not_count() -> None:
    place = Place()
    place.name(*OTHERS[:ENOUGH])
    place.doubts.said(OTHERS[0], (), 1.0)
    assert place.gone(LATE) == []
    place.doubts.forget(OTHERS[1], 3.0)
    assert place.doubts.doubtful == {VICTIM}
    place.doubts.forget(OTHERS[2], 3.0)
    assert place.doubts.doubtful == frozenset()


def test_who_is_named_before_we_hear_of_it_is_doubtful_from_then_on() -> None:
    place = Place()
    del place.known[VICTIM]
    place.name(*OTHERS[:ENOUGH])
    assert place.doubts.doubtful == frozenset()
    place.known[VICTIM] = 7
    place.doubts.heard(VICTIM, 7, 1.0)
    assert place.doubts.doubtful == {VICTIM}
    assert place.gone(1.0 + LATE) == [VICTIM]


def test_some_are_asked_to_check_and_in_a_small_mesh_all() -> None:
    def asked(me: NodeId, members: int) -> bool:
        doubts = Doubts(me, {VICTIM: 7}.get)
        doubts.said(OTHERS[0], (Loss(VICTIM, 7),), 0.0)
        first = doubts.verdicts(LATE, members).check
        assert doubts.verdicts(LATE + 1, members).check == []  # once
        return first == [VICTIM]

    everybody = [NodeId(f"node{n}") for n in range(1000)]
    assert all(asked(node, 7) for node in everybody[:50])
    assert WITNESSES / 3 < sum(asked(node, 1000) for node in everybody) < WITNESSES * 3


def test_we_answer_whoever_names_us_but_nobody_all_the_time() -> None:
    doubts, losses = Doubts(ME, {}.get), (Loss(ME, 1),)
    assert not doubts.named_us(OTHERS[0], (Loss(VICTIM, 1),), 0.0)
    assert doubts.named_us(OTHERS[0], losses, 0.0)
    assert not doubts.named_us(OTHERS[0], losses, ANSWER_S / 2)
    assert doubts.named_us(OTHERS[1], losses, ANSWER_S / 2)
    assert doubts.named_us(OTHERS[0], losses, ANSWER_S + 1)


def test_we_name_no_more_than_may_be_announced() -> None:
    known = {NodeId(f"node{n}"): 1 for n in range(50)}
    doubts = Doubts(ME, known.get)
    for node in known:
        doubts.lost(node, 0.0, until=120.0)
    assert [loss.node for loss in doubts.ours(1.0)] == list(known)[-MAX_HINTS:]
    assert doubts.doubtful == set(list(known)[-MAX_HINTS:])


happenings = st.lists(
    st.tuples(
        st.sampled_from(["name", "drop", "refute", "leave", "look"]),
        st.integers(0, 5),
        st.integers(-1, 1),
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(happenings)
def test_whatever_is_said_only_enough_announcers_of_the_newest_make_a_node_gone(
    happened: list[tuple[str, int, int]],
) -> None:
    place, now = Place(), 0.0
    saying: dict[NodeId, int] = {}
    for what, who, off in happened:
        now += 1.0
        announcer = OTHERS[who]
        if what == "name":
            saying[announcer] = place.known[VICTIM] + off
            place.name(announcer, sequence=saying[announcer], now=now)
        elif what == "drop":
            saying.pop(announcer, None)
            place.doubts.said(announcer, (), now)
        elif what == "refute":
            place.known[VICTIM] += 1
            place.doubts.heard(VICTIM, place.known[VICTIM], now)
        elif what == "leave":
            saying.pop(announcer, None)
            place.doubts.forget(announcer, now)
        newest = [one for one, said in saying.items() if said == place.known[VICTIM]]
        gone = place.gone(now)
        assert not gone or len(newest) >= ENOUGH
        assert not place.doubts.doubtful or newest
