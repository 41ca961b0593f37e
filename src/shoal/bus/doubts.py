"""Who may have died: what announcers say of each other's links, weighed. No clock of its own.

A node that lost a neighbour and could not reach it again names it, with the sequence of the
announcement that it knew (`Announcement.lost`). Of what is said about a node counts only what names
its newest announcement: a node that lives announces itself anew when it hears itself named, and
that refutes all of it. Until then

- a node that anybody names is doubtful: not the first choice of a route;
- if it does not refute within REFUTE_S, a few who are chosen by lot try to reach it themselves;
- it is gone if after that time we could not reach it ourselves, or ENOUGH announcers name it.

So nobody can remove a node whose announcements arrive, and no liar alone can remove anybody. Each
announcer counts once, names MAX_HINTS nodes at most, and what was refuted is not believed of the
same announcer about the same node for MUTE_S.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from ..units import NodeId
from .announcement import MAX_HINTS, Loss
from .limits import Bounded

REFUTE_S = 2.0
ENOUGH = 3
WITNESSES = 8  # of those who hear of it, so many check, whatever the size of the mesh
MUTE_S = 60.0
ANSWER_S = 10.0

_MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Verdicts:
    gone: list[NodeId]  # remove these
    check: list[NodeId]  # try to reach these, and call `Doubts.lost` if it fails


@dataclass(slots=True)
class _Named:
    """What is said about one node: by whom, and of which announcement of it."""

    claims: dict[NodeId, int] = field(default_factory=dict)
    since: float | None = None  # it has been doubtful without a break
    checked: bool = False


class Doubts:
    """`known` tells the sequence of the newest announcement that we hold of a node, or None."""

    def __init__(self, me: NodeId, known: Callable[[NodeId], int | None]) -> None:
        self._me, self._known = me, known
        self._named: dict[NodeId, _Named] = {}
        self._by: dict[NodeId, tuple[Loss, ...]] = {}  # what each announcer says
        self._ours: Bounded[NodeId, tuple[int, float]] = Bounded(MAX_HINTS)  # sequence, until
        self._answered: Bounded[NodeId, float] = Bounded(_MAX_REMEMBERED)
        self._muted: Bounded[tuple[NodeId, NodeId], float] = Bounded(_MAX_REMEMBERED)
        self._doubtful: frozenset[NodeId] = frozenset()

    @property
    def doubtful(self) -> frozenset[NodeId]:
        return self._doubtful

    @property
    def due(self) -> float | None:
        """When to ask for verdicts next."""
        waiting = [
            one.since for one in self._named.values() if one.since is not None and not one.checked
        ]
        return min(waiting) + REFUTE_S if waiting else None

    def ours(self, now: float) -> tuple[Loss, ...]:
        """What to announce."""
        for node in [node for node, (_, until) in self._ours.items() if until < now]:
            self._unsay(node, now)
        return tuple(Loss(node, sequence) for node, (sequence, _) in self._ours.items())

    def lost(self, node: NodeId, now: float, until: float) -> bool:
        """We ourselves cannot reach it; `until` when it would be news. False if we said so already,
        or do not know it.
        """
        sequence = self._known(node)
        if sequence is None or self._ours.get(node, (None, 0.0))[0] == sequence:
            return False
        before = set(self._ours)
        self._ours[node] = sequence, until
        for surplus in before - set(self._ours):
            self._drop(surplus, self._me, now)
        self._claim(node, self._me, sequence, now)
        return True

    def found(self, node: NodeId, now: float) -> bool:
        """We have a link with it, whatever is said. True if it was us who said it."""
        named = self._named.get(node)
        if named is not None and named.since is not None:
            named.since, named.checked = now, True  # until more is said
        ours = node in self._ours
        if ours:
            self._unsay(node, now)
        return ours

    def said(self, announcer: NodeId, losses: tuple[Loss, ...], now: float) -> None:
        """All that this announcer names now; what it named before and does not any more is over."""
        before = self._by.pop(announcer, ())
        if not losses and not before:
            return
        if losses:
            self._by[announcer] = losses
        for loss in before:
            if loss not in losses:
                self._drop(loss.node, announcer, now)
        for loss in losses:
            if loss not in before and loss.node not in (announcer, self._me):
                self._claim(loss.node, announcer, loss.sequence, now)

    def named_us(self, announcer: NodeId, losses: tuple[Loss, ...], now: float) -> bool:
        """Are we to say that we live? Nobody makes us say it again within ANSWER_S."""
        if not losses or not any(loss.node == self._me for loss in losses):
            return False
        if now - self._answered.get(announcer, -ANSWER_S) < ANSWER_S:
            return False
        self._answered[announcer] = now
        return True

    def heard(self, node: NodeId, sequence: int, now: float) -> None:
        """It announced itself anew: what names an older announcement is refuted."""
        named = self._named.get(node)
        if named is None:
            return
        for announcer, claimed in list(named.claims.items()):
            if claimed < sequence:
                self._muted[announcer, node] = now + MUTE_S
                del named.claims[announcer]
        if self._ours.get(node, (sequence, 0.0))[0] < sequence:
            del self._ours[node]
        self._weigh(node, now)

    def forget(self, node: NodeId, now: float) -> None:
        """It left or ran out: what it says does not count, and what is said of it is settled."""
        self.said(node, (), now)
        self._weigh(node, now)

    def verdicts(self, now: float, members: int) -> Verdicts:
        """Those who had their time to refute. `members` of the mesh hear what we hear."""
        gone, check = [], []
        for node in sorted(self._doubtful):
            named = self._named[node]
            if named.since is None or now < named.since + REFUTE_S:  # as in `due`
                continue
            valid = self._valid(node)
            if self._me in valid or len(valid) >= ENOUGH:
                gone.append(node)
            elif not named.checked and self._is_witness(node, members):
                check.append(node)
            named.checked = True
        return Verdicts(gone, check)

    def _claim(self, node: NodeId, announcer: NodeId, sequence: int, now: float) -> None:
        if announcer != self._me and self._muted.get((announcer, node), 0.0) > now:
            return
        self._named.setdefault(node, _Named()).claims[announcer] = sequence
        self._weigh(node, now)

    def _drop(self, node: NodeId, announcer: NodeId, now: float) -> None:
        if named := self._named.get(node):
            named.claims.pop(announcer, None)
            self._weigh(node, now)

    def _unsay(self, node: NodeId, now: float) -> None:
        del self._ours[node]
        self._drop(node, self._me, now)

    def _valid(self, node: NodeId) -> list[NodeId]:
        """Who names the newest announcement of it that we know."""
        sequence = self._known(node)
        claims = self._named[node].claims
        return [announcer for announcer, claimed in claims.items() if claimed == sequence]

    def _weigh(self, node: NodeId, now: float) -> None:
        """Is it doubtful?"""
        named = self._named.get(node)
        if named is None:
            return
        valid = self._valid(node)
        if valid and named.since is None:
            named.since, named.checked = now, False
            self._doubtful |= {node}
        elif not valid and named.since is not None:
            named.since = None
            self._doubtful -= {node}
        elif len(valid) >= ENOUGH or self._me in valid:
            named.checked = False  # to be looked at again
        if not named.claims:
            del self._named[node]

    def _is_witness(self, node: NodeId, members: int) -> bool:
        """By lot, the same whoever asks: WITNESSES of all members, on average."""
        return _lot(self._me, node, self._known(node)) * max(1, members) < WITNESSES


def _lot(*parts: object) -> float:
    """0..1 by hash."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
