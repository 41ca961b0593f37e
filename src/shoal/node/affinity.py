"""Which route has the pages of which prompts, as far as this gateway has sent them there.

Stages keep the pages of sessions that have ended and share them with sessions of the same gateway
on the very same route that begin with the same text. Only names of pages are kept here, made with a
key: neither prompts nor anything that could be tried against them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..engine.prefix import PAGE_TOKENS, page_digests
from ..units import ModelId, NodeId, Slice

MAX_PAGES = 1 << 15  # that are remembered, all prompts together
MAX_ROUTES = 4  # of one page
MEMORY_S = 600.0  # by then a stage has most likely needed the room


class Known(NamedTuple):
    """A route that has been taken."""

    compute: str
    hops: tuple[tuple[NodeId, Slice], ...]


class Affinity:
    """`secret` keys the names of pages; `clock` gives seconds."""

    def __init__(self, secret: bytes, clock: Callable[[], float]) -> None:
        self._secret, self._clock = secret, clock
        self._pages: OrderedDict[bytes, dict[Known, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def names(self, model: ModelId, ids: Sequence[int]) -> list[bytes]:
        """Of the whole pages of a prompt, each chained to the one before it."""
        if len(ids) <= PAGE_TOKENS or max(ids) >= 1 << 32 or min(ids) < 0:
            return []
        root = hashlib.blake2b(model.encode(), key=self._secret, digest_size=16).digest()
        return page_digests(ids[:-1], PAGE_TOKENS, root)  # the last token is always computed

    def remember(self, names: Sequence[bytes], route: Known) -> None:
        """A prompt with these pages goes that way. The first page is forgotten last: without it
        none of the others is found.
        """
        now = self._clock()
        for name in reversed(names[:MAX_PAGES]):
            routes = self._pages.setdefault(name, {})
            routes.pop(route, None)
            routes[route] = now
            if len(routes) > MAX_ROUTES:
                del routes[next(iter(routes))]
            self._pages.move_to_end(name)
        while len(self._pages) > MAX_PAGES:
            self._pages.popitem(last=False)

    def find(self, names: Sequence[bytes]) -> dict[Known, int]:
        """For each route that has pages of this prompt: tokens that it need not compute again."""
        youngest = self._clock() - MEMORY_S
        found: dict[Known, int] = {}
        for count, name in enumerate(names, 1):
            if name not in self._pages:
                break
            for route, at in self._pages[name].items():
                if at >= youngest:
                    found[route] = count * PAGE_TOKENS
        return found
