"""The time between two losses of the link to a node. Pure.

Whoever was gone may have been wrong before, and what it said is in the pages of others: what was
computed with its help in one era is not met in the next.
"""

from __future__ import annotations

from ..units import NodeId

MAX_NODES = 4096  # that are remembered; for all others an era ends when one of these is forgotten


class Eras:
    def __init__(self) -> None:
        self._losses = 0
        self._last: dict[NodeId, int] = {}  # loss of each, the longest ago first
        self._others = 0

    def of(self, node: NodeId) -> int:
        return self._last.get(node, self._others)

    def lost(self, node: NodeId) -> None:
        self._losses += 1
        self._last.pop(node, None)
        self._last[node] = self._losses
        if len(self._last) > MAX_NODES:
            self._others = self._last.pop(next(iter(self._last)))
