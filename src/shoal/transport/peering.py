"""Which of several links between two nodes is the one. Events in, instructions out.

Both nodes may dial each other at the same moment, through several addresses, and one of them may
have lost a link that the other believes in. So a link takes three steps: it arrives with its
identity proved, the dialled side welcomes it, the dialling side confirms it. Then frames flow.

Of two simultaneous dials that of the smaller node id wins: the smaller parks what arrives while it
dials and welcomes it only if its own dial fails; the larger welcomes at once, and does not confirm
its own dial before what it welcomed is settled. Hence at most one link is ever confirmed, unless
the dialling side had lost the earlier one, and then the new link replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

MAX_WAITING = 8  # links from one node that are not confirmed yet

L = TypeVar("L")


@dataclass(frozen=True, slots=True)
class Dial:
    """Try to reach the peer; report `dial_answered` or `dial_failed`."""


@dataclass(frozen=True, slots=True)
class CancelDial:
    """Another link has won."""


@dataclass(frozen=True, slots=True)
class SendWelcome(Generic[L]):
    link: L


@dataclass(frozen=True, slots=True)
class SendConfirm(Generic[L]):
    link: L


@dataclass(frozen=True, slots=True)
class Discard(Generic[L]):
    """Close a link that is not, or no longer, the one."""

    link: L


@dataclass(frozen=True, slots=True)
class Up(Generic[L]):
    link: L


@dataclass(frozen=True, slots=True)
class Down:
    """The peer has no link any more; frames may have been lost."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Nobody could be reached; tell those who wait."""


Instruction = (
    Dial | CancelDial | SendWelcome[L] | SendConfirm[L] | Discard[L] | Up[L] | Down | GiveUp
)


@dataclass(slots=True)
class Peering(Generic[L]):
    """All links to one peer. `ours_wins`: our node id is the smaller."""

    ours_wins: bool
    live: L | None = None
    wanting: bool = False  # somebody waits for a link
    dialing: bool = False
    answered: L | None = None  # our dial was welcomed, but `offered` is to be settled first
    offered: list[L] = field(default_factory=list)  # theirs, welcomed, not confirmed yet
    parked: list[L] = field(default_factory=list)  # theirs, not welcomed while we dial

    @property
    def idle(self) -> bool:
        """Nothing is there and nothing is expected."""
        busy = self.live or self.dialing or self.answered or self.offered or self.parked
        return not busy and not self.wanting

    def wanted(self) -> list[Instruction[L]]:
        """Somebody wants to send."""
        if self.live is not None:
            return []
        self.wanting = True
        if self.dialing or self.answered is not None or self.offered:
            return []
        self.dialing = True
        return [Dial()]

    def arrived(self, link: L) -> list[Instruction[L]]:
        """The peer dialled us and proved who it is."""
        if len(self.offered) + len(self.parked) >= MAX_WAITING:
            return [Discard(link)]
        if self.dialing and self.ours_wins:
            self.parked.append(link)
            return []
        return self._welcome([link])

    def dial_answered(self, link: L) -> list[Instruction[L]]:
        """Our dial was welcomed."""
        self.dialing = False
        if self.live is not None:
            return [Discard(link)]
        if self.offered:
            self.answered = link
            return []
        return [SendConfirm(link), *self._settle(link)]

    def dial_failed(self) -> list[Instruction[L]]:
        self.dialing = False
        parked, self.parked = self.parked, []
        return self._welcome(parked) or self._give_up_unless_hopeful()

    def confirmed(self, link: L) -> list[Instruction[L]]:
        """The peer chose a link that we had welcomed."""
        self.offered.remove(link)
        return self._settle(link)

    def lost(self, link: L) -> list[Instruction[L]]:
        """A link of any state has ended."""
        if link is self.live:
            self.live = None
            return [Down()]
        if link is self.answered:
            self.answered = None
            return self._give_up_unless_hopeful()
        if link in self.parked:
            self.parked.remove(link)
        if link in self.offered:
            self.offered.remove(link)
            return self._after_offer()
        return []

    def _welcome(self, links: list[L]) -> list[Instruction[L]]:
        self.offered += links
        return [SendWelcome(link) for link in links]

    def _after_offer(self) -> list[Instruction[L]]:
        """An offer came to nothing: what waited for it goes on."""
        if self.offered or self.dialing or self.live is not None:
            return []
        if self.answered is not None:
            link, self.answered = self.answered, None
            return [SendConfirm(link), *self._settle(link)]
        return self.wanted() if self.wanting else []

    def _give_up_unless_hopeful(self) -> list[Instruction[L]]:
        if self.live is not None or self.offered:
            return []
        self.wanting = False
        return [GiveUp()]

    def _settle(self, link: L) -> list[Instruction[L]]:
        """This link is the one; every other goes."""
        others = [*self.offered, *self.parked]
        others += [other for other in (self.answered, self.live) if other is not None]
        out: list[Instruction[L]] = [Discard(other) for other in others]
        if self.live is not None:
            out.append(Down())
        if self.dialing:
            out.append(CancelDial())
        self.live, self.answered, self.offered, self.parked = link, None, [], []
        self.wanting = self.dialing = False
        return [*out, Up(link)]
