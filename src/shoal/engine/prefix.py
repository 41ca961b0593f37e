"""Pages that outlive their session: kept by what they hold, shared by whoever begins with the same
text.

A whole page is named by a digest that covers its token ids and all pages before it. A page in use
is never written again once it is named: who goes on from it writes into pages of its own. Pages
that nobody uses any more stay until their room is needed, and then go in the order in which they
were last used.

Whoever names a page can say anything about what it holds, hence names count per owner: nobody finds
pages under another's names.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections import OrderedDict
from collections.abc import Sequence

from .pages import PagePool

PAGE_TOKENS = 16  # where nobody says otherwise
DIGEST_BYTES = 16


def page_digests(
    ids: Sequence[int], page_tokens: int, root: bytes, before: Sequence[bytes] = ()
) -> list[bytes]:
    """One digest for each whole page of `ids`, each chained to the one before it, the first to
    `root`.

    `before` are the digests of the first pages, where they are known already.
    """
    digests = list(before)
    parent = digests[-1] if digests else root
    for start in range(len(digests) * page_tokens, len(ids) - page_tokens + 1, page_tokens):
        words = array.array("I", ids[start : start + page_tokens])
        if sys.byteorder == "big":
            words.byteswap()
        content = parent + words.tobytes()
        parent = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
        digests.append(parent)
    return digests


class PrefixPool:
    """A pool whose pages can have several holders, and a name under which they are found again.

    A page is free, held by one or more sessions, or idle: named and held by nobody. Idle pages
    count as free, because they are given away when room is needed.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self._pool = PagePool(pages, page_size)
        self._holders: dict[int, int] = {}  # page: how many hold it
        self._named: dict[tuple[str, bytes], int] = {}
        self._names: dict[int, tuple[str, bytes]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def pages(self) -> int:
        return self._pool.pages

    @property
    def page_size(self) -> int:
        return self._pool.page_size

    @property
    def total_tokens(self) -> int:
        return self._pool.total_tokens

    @property
    def free_pages(self) -> int:
        return self.pages - len(self._holders)

    @property
    def free_tokens(self) -> int:
        return self.free_pages * self.page_size

    @property
    def used_fraction(self) -> float:
        return len(self._holders) / self.pages

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def find(self, owner: str, digests: Sequence[bytes]) -> list[int]:
        """The pages at the beginning of this chain that are still here."""
        found: list[int] = []
        for digest in digests:
            page = self._named.get((owner, digest))
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Sequence[int]) -> None:
        """One more session uses these pages, which `find` has named."""
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
            self._idle.pop(page, None)

    def take(self, count: int) -> tuple[int, ...]:
        """So many pages for one session alone. Raises Overloaded when fewer are free."""
        if not count:
            return ()
        while self._idle and self._pool.free_tokens < count * self.page_size:
            self._forget(self._idle.popitem(last=False)[0])
        taken = self._pool.allocate(count * self.page_size)
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def name(self, owner: str, digest: bytes, page: int) -> None:
        """`page`, which is held, has been filled with this content and will not be written again.

        The first page of a name keeps it, and a page keeps its first name.
        """
        key = (owner, digest)
        if key not in self._named and page not in self._names:
            self._named[key] = page
            self._names[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """A session lets go of its pages. Raises ValueError for pages that nobody holds.

        The last page of a text becomes idle before the first: without those before it, a page is
        never found.
        """
        if not self._holders.keys() >= set(pages):
            raise ValueError(f"pages {sorted(set(pages) - self._holders.keys())} are not in use")
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._abandon(page)

    def _abandon(self, page: int) -> None:
        del self._holders[page]
        if page in self._names:
            self._idle[page] = None
        else:
            self._pool.free([page])

    def _forget(self, page: int) -> None:
        del self._named[self._names.pop(page)]
        self._pool.free([page])


class UnsharedPool(PrefixPool):
    """Pages of an engine that keeps each sequence to itself: nobody finds them again."""

    def name(self, owner: str, digest: bytes, page: int) -> None:
        """Passed over."""
