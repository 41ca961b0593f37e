"""Who gets pages, and who makes room: a session has pages for the tokens it knows and a few more,
and asks for others as it grows. When there are none left, the youngest goes.

Age is the one order that all stages share. Whoever is the oldest in the mesh is never sent away and
can send away everybody else: it always gets on, and so, one after the other, all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..engine.prefix import PrefixPool
from ..units import NodeId, SessionId
from .session import Session, StageSessionsConfig

GONE = -1  # in the place of a page that was given back early

# soon: pages are on their way, from a session whose last forward is not done; wait: others are
# older; a session: it has to make room, then ask again
Verdict = Literal["granted", "soon", "wait"] | Session


@dataclass
class Admission:
    """The pages of one stage. Whoever asks it carries out what it says: sessions are not ended
    here.
    """

    pool: PrefixPool
    config: StageSessionsConfig
    share: Callable[[NodeId], float]  # of the pages, for the sessions of one gateway
    _wanting: dict[SessionId, Session] = field(default_factory=dict)
    _holders: dict[SessionId, Session] = field(default_factory=dict)  # those that may be sent away
    _held: Counter[NodeId] = field(default_factory=Counter)  # pages, by gateway

    # ---- asking

    def want(self, this: Session) -> None:
        """It waits to be opened, or to go on."""
        self._wanting[this.open.session] = this

    def wanting(self) -> list[Session]:
        """The oldest first."""
        return sorted(self._wanting.values(), key=lambda each: each.age)

    def waiting(self) -> list[Session]:
        """Those not opened yet, the oldest first."""
        return sorted(self.unopened(), key=lambda each: each.age)

    def unopened(self) -> list[Session]:
        return [each for each in self._wanting.values() if each.state == "waiting"]

    def ask(self, this: Session) -> Verdict:
        """Pages for what comes next: all that is known when it is opened, then the next rows."""
        granted = self._grow(this) if this.state == "running" else self._begin(this)
        if granted:
            self._wanting.pop(this.open.session, None)
            return "granted"
        return self._in_the_way(this)

    def crowds(self, this: Session) -> bool:
        """One session may have all the pages; several of one gateway only its share of them."""
        share, held = self.share(this.gateway), self._held[this.gateway]
        most = self.pool.pages * share
        return share < 1.0 and held > 0 and held + self.pool.pages_for(self._needs(this)) > most

    def _needs(self, this: Session) -> int:
        """Tokens that its pages must have room for."""
        if this.state == "running":
            return this.pending[0].stop if this.pending else this.position
        return self._roomy(this, this.open.known_tokens)

    def _roomy(self, this: Session, tokens: int) -> int:
        return min(tokens + self.config.headroom_tokens, this.open.reserve_tokens)

    def _begin(self, this: Session) -> bool:
        found = self._found(this)
        missing = self.pool.pages_for(self._needs(this)) - len(found)
        self.pool.hold(found)  # or they were given away as the missing ones
        if missing > self.pool.free_pages:
            self.pool.release(found)
            return False
        self._add(this, (*found, *self.pool.take(missing)))
        this.position = this.computed = len(found) * self.pool.page_size
        this.named = len(found)
        return True

    def _found(self, this: Session) -> list[int]:
        most = this.open.prefix_tokens // self.pool.page_size
        return self.pool.find(this.gateway, this.digests[:most])

    def _grow(self, this: Session) -> bool:
        needs = self._needs(this)
        for tokens in (self._roomy(this, needs), needs):
            missing = self.pool.pages_for(tokens) - len(this.pages)
            if missing <= self.pool.free_pages:
                self._add(this, self.pool.take(max(0, missing)))
                return True
        return False

    def _add(self, this: Session, pages: Sequence[int]) -> None:
        this.pages = (*this.pages, *pages)
        self._held[this.gateway] += len(pages)
        self._holders[this.open.session] = this

    # ---- making room

    def _in_the_way(self, this: Session) -> Verdict:
        """The youngest that has to go for this one, if that helps; a session that runs and cannot
        be helped goes itself.
        """
        if self._fits(this, without=()):
            return "soon"
        younger = [each for each in self._holders.values() if self._yields(each, this)]
        if younger and self._fits(this, without=younger):
            return max(younger, key=lambda each: each.age)
        return this if this.state == "running" else "wait"

    def _fits(self, this: Session, without: Collection[Session]) -> bool:
        own = self._kept(this) if this.pages else set(self._found(this))
        staying = (self._kept(each) for each in self._holders.values() if each not in without)
        taken = own.union(*staying)
        missing = self.pool.pages_for(self._needs(this)) - this.gone - len(own)
        return missing <= self.pool.pages - len(taken)

    @staticmethod
    def _kept(this: Session) -> set[int]:
        return set(this.pages[this.gone :])

    def _yields(self, other: Session, this: Session) -> bool:
        """Younger; and nobody takes from another gateway beyond its own share."""
        if other.age <= this.age:
            return False
        wanted = self.pool.pages_for(self._needs(this)) - len(this.pages)
        most = self.pool.pages * self.share(this.gateway)
        return other.gateway == this.gateway or self._held[this.gateway] + wanted <= most

    # ---- letting go

    def rest(self, this: Session) -> None:
        """It wants nothing until it is told how to go on."""
        self._wanting.pop(this.open.session, None)

    def stay(self, this: Session) -> None:
        """It has another name."""
        self._holders[this.open.session] = this

    def rewind(self, this: Session, tokens: int) -> None:
        """Go on after its first `tokens`, or from 0 where these are not all there any more. Then
        its pages are let go: others may find them, so they are not for it to write again.
        """
        window, page = self.config.window, self.pool.page_size
        reach = 0 if window is None else max(0, tokens - window + 1) // page
        if tokens > this.computed or this.named * page > tokens or reach < this.gone:
            tokens = 0
        if tokens == 0 and (this.named or this.gone):
            kept = this.pages[this.gone :]
            self._held[this.gateway] -= len(kept)
            self.pool.release(kept)
            this.pages, this.gone, this.named = (), 0, 0
        this.position = this.computed = tokens
        this.draft = ()

    def trim(self, this: Session, tokens: int) -> None:
        """It computes more than its pages would have spared it: those from `tokens` on, which it
        shares, are not for it to write.
        """
        keep, drop = tokens // self.pool.page_size, this.position // self.pool.page_size
        surplus = this.pages[keep:drop]
        this.pages = (*this.pages[:keep], *this.pages[drop:])
        this.position = this.computed = tokens
        this.named = min(this.named, keep)
        self._held[this.gateway] -= len(surplus)
        self.pool.release(surplus)

    def name(self, this: Session) -> None:
        """Let others find the whole pages that it has filled, as far as their digests are known."""
        whole = min(this.computed // self.pool.page_size, len(this.digests))
        if self.config.share_prefixes:
            while this.named < whole and this.pages[this.named] != GONE:
                self.pool.name(this.gateway, this.digests[this.named], this.pages[this.named])
                this.named += 1

    def forget_the_distant(self, this: Session) -> None:
        """Where every layer looks back only so far, pages beyond that are of no use to it. Named
        ones stay idle for others.
        """
        if self.config.window is None:
            return
        reach = max(0, this.computed - self.config.window + 1) // self.pool.page_size
        distant = [page for page in this.pages[this.gone : reach] if page != GONE]
        if distant:
            this.pages = (*[GONE] * reach, *this.pages[reach:])
            this.gone = reach
            self._held[this.gateway] -= len(distant)
            self.pool.release(distant)

    def leave(self, this: Session) -> None:
        """It has ended and wants nothing more; a forward may still use its pages."""
        self._wanting.pop(this.open.session, None)
        self._holders.pop(this.open.session, None)

    def release(self, this: Session) -> None:
        kept = this.pages[this.gone :]
        self._held[this.gateway] -= len(kept)
        if not self._held[this.gateway]:
            del self._held[this.gateway]
        self.pool.release(kept)
        this.pages, this.gone = (), 0
