"""Guesses the next tokens of a session from what it has said already: copied, never computed.

Text repeats itself: names, quotations, code, a document that is being rewritten. The tokens that
followed the last time are sent along as a *draft*, and the last stage checks all of them in the
pass that it makes anyway. A wrong draft costs a few positions in one forward, never the text: see
`verify` in `sampling.py`. The idea is prompt-lookup decoding (Saxena, 2023).

Pure and without torch. `draft_model.py` is the other drafter.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..units import SessionId

MAX_DRAFT = 16  # tokens in one row
QUICK_TOKENS = 512  # are taken in within half a millisecond
POSITIONAL = ("attention", "full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True)
class Wish:
    """Up to `count` tokens, please, for a session whose tokens so far are `ids`."""

    session: SessionId
    ids: Sequence[int]
    count: int


class Drafter(Protocol):
    """Called with one wish a session, by one thread at a time; `ids` only ever grow."""

    def is_quick(self, wishes: Sequence[Wish]) -> bool:
        """Whether these take less time than to hand them to the engine thread."""

    def draft(self, wishes: Sequence[Wish]) -> list[tuple[int, ...]]:
        """At most `count` token ids for each wish, in order; () where nothing comes to mind."""

    def forget(self, session: SessionId) -> None:
        """The session is over, or was never here."""


class NgramDrafter:
    """An index for each session."""

    def __init__(self) -> None:
        self._indices: dict[SessionId, NgramIndex] = {}

    def is_quick(self, wishes: Sequence[Wish]) -> bool:
        return sum(map(self._unread, wishes)) <= QUICK_TOKENS

    def _unread(self, wish: Wish) -> int:
        index = self._indices.get(wish.session)
        return len(wish.ids) - (index.length if index is not None else 0)

    def draft(self, wishes: Sequence[Wish]) -> list[tuple[int, ...]]:
        return [self._draft(wish) for wish in wishes]

    def _draft(self, wish: Wish) -> tuple[int, ...]:
        index = self._indices.setdefault(wish.session, NgramIndex())
        index.extend(wish.ids[index.length :])
        return index.draft(wish.count)

    def forget(self, session: SessionId) -> None:
        self._indices.pop(session, None)


class NgramIndex:
    """Where each pair of neighbouring tokens last stood, and where before that.

    A token costs one look-up; a draft follows at most CANDIDATES places and takes what followed
    the longest match, the latest one of several. Only the last WINDOW..2 WINDOW tokens count.
    """

    WINDOW = 1 << 15  # tokens; an index of 2 WINDOW takes about 7 MB
    CANDIDATES = 16
    LONGEST = 8  # tokens of a match; a longer one is no better

    def __init__(self) -> None:
        self.length = 0  # tokens taken in, with those forgotten since
        self._start_again(())

    def _start_again(self, ids: Iterable[int]) -> None:
        self._ids = array("I")
        self._latest: dict[int, int] = {}  # pair -> place after it
        self._earlier = array("i")  # place -> the one before it after the same pair, or -1
        for token in ids:
            self._append(token)

    def extend(self, ids: Sequence[int]) -> None:
        self.length += len(ids)
        for token in ids[-2 * self.WINDOW :]:
            self._append(token)
            if len(self._ids) >= 2 * self.WINDOW:
                self._start_again(self._ids[-self.WINDOW :])

    def _append(self, token: int) -> None:
        place = len(self._ids)
        pair = self._pair(place)
        self._earlier.append(self._latest.get(pair, -1))
        if place >= 2:
            self._latest[pair] = place
        self._ids.append(token)

    def _pair(self, place: int) -> int:
        """The two tokens before `place` as one number; -1 when there are not two."""
        return self._ids[place - 2] << 32 | self._ids[place - 1] if place >= 2 else -1

    def draft(self, count: int) -> tuple[int, ...]:
        """What followed the last tokens the last time, () when they are new."""
        place, longest = -1, 0
        candidate = self._latest.get(self._pair(len(self._ids)), -1)
        for _ in range(self.CANDIDATES):
            if candidate < 0 or longest >= self.LONGEST:
                break
            matching = self._matching(candidate)
            if matching > longest:
                place, longest = candidate, matching
            candidate = self._earlier[candidate]
        return self._copied(place, count) if place >= 0 else ()

    def _matching(self, place: int) -> int:
        """How many tokens before `place` equal the last ones of all."""
        ids, end = self._ids, len(self._ids)
        most = min(self.LONGEST, place)
        for back in range(1, most + 1):
            if ids[place - back] != ids[end - back]:
                return back - 1
        return most

    def _copied(self, place: int, count: int) -> tuple[int, ...]:
        """`count` tokens from `place` on; a copy that reaches the end goes on with itself."""
        period = len(self._ids) - place
        return tuple(self._ids[place + at % period] for at in range(count))


class DraftLength:
    """How long the drafts of one session may be: longer while they are right, none for a while
    after one that was wrong from the start.

    Text in which nothing repeats is left alone but for a probe now and then, ever more rarely.
    """

    FIRST, REST, LONGEST_REST = 4, 2, 64  # tokens

    def __init__(self, most: int = MAX_DRAFT) -> None:
        self._most = most
        self._length = min(self.FIRST, most)
        self._rest = self.REST  # how long the next rest is
        self._resting = 0  # tokens yet to pass without a draft

    def allowed(self) -> int:
        """For the row that is about to be computed."""
        return 0 if self._resting else self._length

    def report(self, drafted: int, accepted: int) -> None:
        """A row came back: so many of its drafted tokens were right."""
        if not drafted:
            self._resting = max(0, self._resting - 1)
        elif not accepted:
            self._length = 1
            self._resting, self._rest = self._rest, min(2 * self._rest, self.LONGEST_REST)
        else:
            grown = 2 * self._length if accepted == drafted else accepted + 1
            self._length, self._rest = min(self._most, grown), self.REST


def rewinds(config: Mapping[str, Any]) -> bool:
    """Whether a model's layers remember by position, so that a wrong draft is written over. Those
    that keep a running state cannot take back what they have read.
    """
    kinds = map(str, config.get("layer_types") or ())
    states = ("linear_", "mamba_", "ssm_", "conv_", "lru_", "rwkv_")
    return all(kind in POSITIONAL for kind in kinds) and not any(
        key.startswith(states) for key in config
    )
