"""What a relay delivered becomes an announcement, a goodbye or a message, or is dropped.

Checks go from cheap to dear: size, rate, signature, content, proofs; times at last. No socket, no
clock of its own; nothing that arrives can raise out of here, and what is dropped is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import PeerError
from ..identity import Mesh
from ..units import NodeId
from .announcement import Announcement
from .base import Listener
from .letters import MAX_ANNOUNCEMENT_CHARS, believe_announcement, read_goodbye, read_letter
from .limits import Bounded, Buckets, TokenBucket
from .stamps import Stamps

MAX_AGE_S = 900
MAX_AHEAD_S = 60

_MAX_WRAP_CHARS = 1 << 16  # as large as relays take events
_MAX_REMEMBERED = 4096
_MAX_UNTIMELY = 512


@dataclass(frozen=True, slots=True)
class Note:
    """An event off a relay, nothing of it believed yet.

    `expires_at` is None without an expiration. `is_genuine` checks id and signature.
    """

    author: NodeId
    created_at: int
    expires_at: int | None
    topics: tuple[str, ...]
    content: str
    is_genuine: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Unsealed:
    """What was inside a wrap: its proven sender, an id that no replay can change, the text."""

    sender: NodeId
    seal_id: str
    text: str


class _Dropped(Exception):
    """A reason to drop a note, as counted."""


class Inbox:
    """Judges what arrives for `node` in `mesh`; `listener` hears what has passed. `believe` reads
    an announcement and proves it, or raises PeerError.
    """

    def __init__(
        self,
        mesh: Mesh,
        node: NodeId,
        clock: Callable[[], float],
        believe: Callable[[Mesh, str], Announcement] = believe_announcement,
    ) -> None:
        self.listener = Listener()
        self.stamps = Stamps(clock, lambda offset_s: self.listener.on_clock(offset_s))
        self._mesh, self._node, self._clock, self._believe = mesh, node, self.stamps.now, believe
        self.dropped: Counter[str] = Counter()
        self._all = TokenBucket(per_s=400, burst=4000)
        self._authors: Buckets[NodeId] = Buckets(per_s=1, burst=30)
        self._senders: Buckets[NodeId] = Buckets(per_s=20, burst=100)
        self._newest: Bounded[NodeId, tuple[int, float]] = Bounded(_MAX_REMEMBERED)  # number, when
        self._untimely: Bounded[NodeId, Note] = Bounded(_MAX_UNTIMELY)  # proved, but for its time
        self._era = self.stamps.era
        self._opened: Bounded[str, None] = Bounded(_MAX_REMEMBERED)

    def announcement(self, note: Note) -> None:
        self._judge(note, self._hear_announcement)

    def goodbye(self, note: Note) -> None:
        self._judge(note, self._hear_goodbye)

    def sealed(self, note: Note, unseal: Callable[[], Unsealed]) -> None:
        """`unseal` raises PeerError; it is called once the wrap itself has passed."""
        self._judge(note, lambda wrap: self._hear_sealed(wrap, unseal))

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def _judge(self, note: Note, hear: Callable[[Note], Callable[[], None] | None]) -> None:
        tell: Callable[[], None] | None = None
        try:
            tell = hear(note)
        except _Dropped as reason:
            self.drop(str(reason))
        except PeerError as error:
            self.drop(error.code)
        if tell is not None:
            tell()  # not above: an error of the listener is not the peer's
        if self._era != self.stamps.era:
            self._judge_again()

    def _judge_again(self) -> None:
        """It was our clock that was wrong, and relays do not tell twice what they have told."""
        self._era, notes = self.stamps.era, list(self._untimely.values())
        self._untimely.clear()
        for note in notes:
            self.announcement(note)

    def _hear_announcement(self, note: Note) -> Callable[[], None] | None:
        """Times are looked at last: what is new and proved tells whether our own clock is right."""
        if note.author == self._node:
            return None
        self._check(note, MAX_ANNOUNCEMENT_CHARS, on_topic=True)
        announcement = self._believe(self._mesh, note.content)
        if announcement.node != note.author:
            raise _Dropped("card of another node")
        self._check_newer(note.author, announcement.sequence - 1)
        self.stamps.heard(note.author, announcement.sequence, note.created_at)
        self._untimely[note.author] = note
        self._check_times(note)
        self._check_time(announcement.sent_at)
        del self._untimely[note.author]
        self._newest[note.author] = announcement.sequence, self._clock()
        return lambda: self.listener.on_announcement(announcement)

    def _hear_goodbye(self, note: Note) -> Callable[[], None] | None:
        if note.author == self._node:
            return None
        self._check(note, MAX_ANNOUNCEMENT_CHARS, on_topic=True)
        self._check_times(note)
        last = read_goodbye(note.content)
        self._check_newer(note.author, last)
        self._newest[note.author] = last, self._clock()
        return lambda: self.listener.on_gone(note.author)

    def _hear_sealed(self, note: Note, unseal: Callable[[], Unsealed]) -> Callable[[], None] | None:
        self._check(note, _MAX_WRAP_CHARS, on_topic=False)
        self._check_times(note)
        unsealed = unseal()
        if not self._senders.take(unsealed.sender, self._clock()):
            raise _Dropped("too many of one sender")
        if unsealed.seal_id in self._opened:
            raise _Dropped("replayed")
        payload = read_letter(self._mesh, unsealed.text, self._clock())
        self._opened[unsealed.seal_id] = None
        return lambda: self.listener.on_sealed(unsealed.sender, payload)

    def _check(self, note: Note, max_chars: int, *, on_topic: bool) -> None:
        now = self._clock()
        if len(note.content) > max_chars:
            raise _Dropped("too large")
        if on_topic and self._mesh.topic not in note.topics:
            raise _Dropped("another topic")
        if not self._all.take(now):
            raise _Dropped("too many in all")
        if not note.is_genuine():
            raise _Dropped("forged")
        if on_topic and not self._authors.take(note.author, now):
            raise _Dropped("too many of one author")

    def _check_times(self, note: Note) -> None:
        self._check_time(note.created_at)
        if note.expires_at is not None and note.expires_at <= self._clock():
            raise _Dropped("expired")

    def _check_time(self, at: int) -> None:
        now = self._clock()
        if at > now + MAX_AHEAD_S:
            raise _Dropped("from the future")
        if at < now - MAX_AGE_S:
            raise _Dropped("too old")

    def _check_newer(self, author: NodeId, sequence: int) -> None:
        """Slow relays deliver what another one has overtaken. Times would not tell: an author that
        finds its clock wrong goes back. What is too old to be heard again is forgotten, in case
        that an author has lost count.
        """
        newest, heard_at = self._newest.get(author, (-1, 0.0))
        if sequence < newest and self._clock() < heard_at + MAX_AGE_S:
            raise _Dropped("overtaken")
