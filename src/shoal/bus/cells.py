"""Which part of a large mesh a node listens to: pure decisions, no clock of its own.

A node's place in the tree of cells is given by the bits of a hash of its id. The cell of depth 0 is
the whole mesh, each step down halves it, and a node belongs to one cell of every depth. All that it
says is tagged for all of them; it listens to one: deep enough to hear hundreds, not thousands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..units import NodeId

MAX_DEPTH = 8


def cell_of(node: NodeId) -> int:
    """MAX_DEPTH bits, the first one highest."""
    return hashlib.sha256(node.encode()).digest()[0]


def common_depth(a: int, b: int) -> int:
    """The deepest cell that both nodes belong to."""
    return MAX_DEPTH - (a ^ b).bit_length()


def tag(topic: str, cell: int, depth: int) -> str:
    """What a note for that cell is tagged with. The topic of a private mesh tells nothing about its
    secret, and the bits tell nothing that the author's id on the same note does not.
    """
    return f"{topic}/{cell:0{MAX_DEPTH}b}"[: len(topic) + 1 + depth] if depth else topic


def tags(topic: str, node: NodeId) -> tuple[str, ...]:
    """Of all cells of a node, the whole mesh first."""
    cell = cell_of(node)
    return tuple(tag(topic, cell, depth) for depth in range(MAX_DEPTH + 1))


@dataclass(kw_only=True, frozen=True, slots=True)
class CellsConfig:
    """`most` is four times `fewest`, so that halving or doubling a cell never calls for undoing."""

    fewest: int = 96
    most: int = 384
    widest: int = 2048  # nodes: a cell that has more is not widened, whatever we need
    settle_s: float = 5.0  # after widening, before we judge what we hear
    hold_s: float = 600.0  # a wider cell that had what we need is kept so long
    rest_s: float = 600.0  # and where even it had not, we do not try again sooner; doubles
    max_rest_s: float = 7200.0


@dataclass(frozen=True, slots=True)
class Listening:
    """To which depth a node listens and since when; until when it wants it no deeper, and no wider
    cell again.
    """

    depth: int = 0
    since: float = -1e9
    wide_until: float = -1e9
    rest_until: float = -1e9
    rest_s: float = 0.0  # the last rest

    def after(
        self, heard: Sequence[int], *, wanting: bool, now: float, config: CellsConfig
    ) -> Listening:
        """The next one, a level away at most. `heard[depth]` nodes are known of our cell of that
        depth; `wanting`: they do not suffice for what we need.
        """
        count, wide = heard[self.depth], now < self.wide_until
        if count > config.most and not wide and self.depth < MAX_DEPTH:
            return replace(self, depth=self.depth + 1, since=now)
        if now - self.since < config.settle_s:
            return self
        if count < config.fewest and self.depth:
            return replace(self, depth=self.depth - 1, since=now)
        if wanting and now >= self.rest_until:
            return self._wider(count, config, now)
        return self

    def _wider(self, count: int, config: CellsConfig, now: float) -> Listening:
        if self.depth and count <= config.widest:
            until = now + config.hold_s
            return replace(self, depth=self.depth - 1, since=now, wide_until=until)
        if now < self.wide_until:  # in vain: as we were, and for longer each time
            rest_s = min(config.max_rest_s, 2 * self.rest_s or config.rest_s)
            return replace(self, wide_until=now, rest_until=now + rest_s, rest_s=rest_s)
        return self
