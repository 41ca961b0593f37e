"""Which pages of the KV cache are free. A page holds the keys and values of `page_size` tokens in
every layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from ..errors import NoCapacity, Overloaded


class PagePool:
    """Hands out page numbers, lowest first: a session's pages are mostly neighbours."""

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {pages} pages of {page_size} tokens")
        self.pages, self.page_size = pages, page_size
        self._free = list(range(pages))
        self._used: set[int] = set()

    @property
    def total_tokens(self) -> int:
        return self.pages * self.page_size

    @property
    def free_tokens(self) -> int:
        return len(self._free) * self.page_size

    @property
    def used_fraction(self) -> float:
        return len(self._used) / self.pages

    def allocate(self, tokens: int) -> tuple[int, ...]:
        """Pages for so many tokens.

        Raises NoCapacity when they can never fit, Overloaded when they do not fit now.
        """
        wanted = -(-max(tokens, 1) // self.page_size)
        if wanted > self.pages:
            raise NoCapacity(
                f"{tokens} tokens do not fit into a KV cache of {self.total_tokens}",
                hint="ask for fewer tokens, or give the node more memory",
            )
        if wanted > len(self._free):
            raise Overloaded(f"{tokens} tokens wanted, {self.free_tokens} free in the KV cache")
        taken = tuple(heapq.heappop(self._free) for _ in range(wanted))
        self._used.update(taken)
        return taken

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back. Raises ValueError for pages not in use: giving back twice is a bug."""
        returned = set(pages)
        if len(returned) != len(pages) or not returned <= self._used:
            raise ValueError(f"pages {sorted(returned - self._used)} are not in use")
        self._used -= returned
        for page in pages:
            heapq.heappush(self._free, page)
