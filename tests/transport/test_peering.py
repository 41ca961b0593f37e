"""Two peerings against each other, with every order of arrival that hypothesis can think of."""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport.peering import (
    MAX_WAITING,
    CancelDial,
    Dial,
    Discard,
    Down,
    GiveUp,
    Instruction,
    Peering,
    SendConfirm,
    SendWelcome,
    Up,
)


@dataclass(eq=False)
class Stream:
    """A connection between side 0 and side 1; each end has a queue of what is on its way to it."""

    dialled_by: int
    inbox: tuple[deque[str], deque[str]] = field(default_factory=lambda: (deque(), deque()))
    ended: set[int] = field(default_factory=set)


class World:
    """Two sides and the streams between them; `step` lets one thing happen."""

    def __init__(self, *, dials_fail: bool = False) -> None:
        self.sides: list[Peering[Stream]] = [Peering(True), Peering(False)]
        self.streams: list[Stream] = []
        self.dialled: list[Stream | None] = [None, None]
        self.gave_up = [0, 0]
        self.downs = [0, 0]
        self._dials_fail = dials_fail

    def want(self, side: int) -> None:
        self._do(side, self.sides[side].wanted())

    def moves(self) -> list[tuple[Stream, int]]:
        return [(s, end) for s in self.streams for end in (0, 1) if s.inbox[end]]

    def step(self, choice: int) -> bool:
        """Deliver one message; False when nothing is on its way."""
        moves = self.moves()
        if not moves:
            return False
        stream, side = moves[choice % len(moves)]
        self._deliver(stream, side, stream.inbox[side].popleft())
        return True

    def break_stream(self, stream: Stream) -> None:
        for end in (0, 1):
            stream.inbox[end].clear()
            stream.inbox[end].append("end")

    def _deliver(self, stream: Stream, side: int, message: str) -> None:
        if side in stream.ended:
            return
        me = self.sides[side]
        match message:
            case "arrive":
                self._do(side, me.arrived(stream))
            case "welcome" if self.dialled[side] is stream:
                self.dialled[side] = None
                self._do(side, me.dial_answered(stream))
            case "confirm" if stream in me.offered:
                self._do(side, me.confirmed(stream))
            case "end":
                stream.ended.add(side)
                self._end(side, stream)
            case _:
                raise AssertionError(f"{message} out of place")

    def _end(self, side: int, stream: Stream) -> None:
        if self.dialled[side] is stream:
            self.dialled[side] = None
            self._do(side, self.sides[side].dial_failed())
        else:
            self._do(side, self.sides[side].lost(stream))

    def _do(self, side: int, instructions: list[Instruction[Stream]]) -> None:
        for instruction in instructions:
            match instruction:
                case Dial():
                    self._dial(side)
                case CancelDial():
                    stream, self.dialled[side] = self.dialled[side], None
                    assert stream is not None
                    self._close(side, stream)
                case SendWelcome(stream):
                    stream.inbox[1 - side].append("welcome")
                case SendConfirm(stream):
                    stream.inbox[1 - side].append("confirm")
                case Discard(stream):
                    self._close(side, stream)
                case GiveUp():
                    self.gave_up[side] += 1
                case Down():
                    self.downs[side] += 1
                case Up():
                    pass

    def _dial(self, side: int) -> None:
        assert self.dialled[side] is None
        stream = Stream(side)
        self.streams.append(stream)
        self.dialled[side] = stream
        if self._dials_fail and side == 0:
            stream.inbox[side].append("end")  # a node that can be dialled by nobody
        else:
            stream.inbox[1 - side].append("arrive")

    def _close(self, side: int, stream: Stream) -> None:
        stream.ended.add(side)
        stream.inbox[1 - side].append("end")


choices = st.lists(st.integers(0, 7), max_size=60)


def run(world: World, order: list[int]) -> None:
    for choice in order:
        world.step(choice)
    for _ in range(1000):
        if not world.step(0):
            return
    raise AssertionError("the two never come to rest")


def assert_one_common_link(world: World) -> None:
    first, second = world.sides
    assert first.live is not None
    assert first.live is second.live
    for side in world.sides:
        assert (side.answered, side.offered, side.parked) == (None, [], [])


@settings(max_examples=300)
@given(choices, st.integers(0, 8), st.booleans())
def test_simultaneous_dials_end_in_one_common_link(order: list[int], gap: int, swap: bool) -> None:
    world = World()
    first, second = (1, 0) if swap else (0, 1)
    world.want(first)
    for choice in order[:gap]:
        world.step(choice)
    world.want(second)
    run(world, order[gap:])
    assert_one_common_link(world)
    assert world.downs == [0, 0]  # no frame was sent on a link that did not last


@settings(max_examples=300)
@given(choices, st.integers(0, 20), st.integers(0, 3))
def test_a_link_that_breaks_at_any_moment_can_be_had_again(
    order: list[int], moment: int, which: int
) -> None:
    world = World()
    world.want(0)
    world.want(1)
    for choice in order[:moment]:
        world.step(choice)
    world.break_stream(world.streams[which % len(world.streams)])
    run(world, order[moment:])
    world.want(0)
    run(world, order)
    world.want(1)
    run(world, order)
    assert_one_common_link(world)


@given(choices)
def test_a_node_that_cannot_dial_is_reached_by_the_other(order: list[int]) -> None:
    world = World(dials_fail=True)
    world.want(0)
    world.want(1)
    run(world, order)
    assert_one_common_link(world)


def test_of_two_simultaneous_dials_that_of_the_smaller_id_wins() -> None:
    world = World()
    world.want(0)
    world.want(1)
    run(world, [])
    assert world.sides[0].live is world.streams[0]
    assert world.streams[0].dialled_by == 0


def test_a_failed_dial_is_reported_once_and_may_be_tried_again() -> None:
    peering: Peering[str] = Peering(True)
    assert peering.wanted() == [Dial()]
    assert peering.wanted() == []
    assert peering.dial_failed() == [GiveUp()]
    assert peering.idle
    assert peering.wanted() == [Dial()]


def test_a_peer_that_lost_its_link_replaces_it_by_a_new_one() -> None:
    peering: Peering[str] = Peering(True)
    peering.arrived("old")
    assert peering.confirmed("old") == [Up("old")]
    assert peering.arrived("new") == [SendWelcome("new")]
    assert peering.live == "old"
    assert peering.confirmed("new") == [Discard("old"), Down(), Up("new")]


def test_of_several_dials_of_one_peer_the_confirmed_one_stays() -> None:
    peering: Peering[str] = Peering(True)
    for link in ("first", "second", "third"):
        peering.arrived(link)
    assert peering.confirmed("second") == [Discard("first"), Discard("third"), Up("second")]
    assert peering.offered == []


def test_unconfirmed_links_of_one_peer_are_bounded() -> None:
    peering: Peering[int] = Peering(True)
    for link in range(MAX_WAITING):
        peering.arrived(link)
    assert peering.arrived(99) == [Discard(99)]


def test_a_lost_live_link_is_reported() -> None:
    peering: Peering[str] = Peering(False)
    peering.wanted()
    assert peering.dial_answered("one") == [SendConfirm("one"), Up("one")]
    assert peering.lost("one") == [Down()]
    assert peering.idle
