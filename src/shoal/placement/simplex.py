"""The simplex method for routes: which of them carry how much, found one route at a time.

A linear programme has a variable for every route, and there are far too many to write down. The
method needs just the one that is cheapest at the present prices of the stages, which is what
`ring.py` finds. At the end the prices prove how far from the optimum the sum can be (Dantzig and
Wolfe 1960; Gilmore and Gomory 1961).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..units import NodeId, Slice
from .expect import Network, StageCost
from .ring import Costs, Part, Piece, cheapest_way

if TYPE_CHECKING:
    from .ring import Floats

NEAR_ENOUGH = 0.01  # of the optimum
NUDGE = 1e-7  # keeps stages apart that are alike: ties make the method go in circles


@dataclass(frozen=True, slots=True)
class Path:
    """A route, and the tokens a second of answers that it carries in the best mixture."""

    parts: tuple[tuple[NodeId, Slice], ...]
    compute: str
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Flow:
    """`bound` is what no mixture can exceed."""

    paths: tuple[Path, ...] = ()
    bound: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return sum(path.tokens_per_s for path in self.paths)


@dataclass(frozen=True, slots=True)
class Carrier:
    """A stage, and what a token takes of its time."""

    node: NodeId
    layers: Slice
    whole: bool
    cost: StageCost


class Simplex:
    """Maximise the sum of the routes' flows, each stage's time at most 1 (revised simplex).

    R rows: what binds, stages first, links as routes begin to use them. `inverse` [R, R] is of the
    matrix whose columns are the basis; `level` [R] what flows through each column. A column is a
    route, or None for the time that is left over in a row. `sent` tokens go over a link for each
    token of an answer.
    """

    def __init__(
        self,
        layers: int,
        carriers: Sequence[Carrier],
        compute: str,
        network: Network | None = None,
        sent: float = 1.0,
    ) -> None:
        import numpy as np

        self.layers, self.carriers, self.compute = layers, carriers, compute
        self.pieces = [
            Piece(n, one.layers.start, one.layers.stop, one.whole) for n, one in enumerate(carriers)
        ]
        count = len(carriers)
        self.nodes = tuple(one.node for one in carriers)
        self.fixed = np.array([one.cost.fixed for one in carriers])
        self.layer = np.array([one.cost.layer for one in carriers])
        self.sample = np.array([one.cost.sample for one in carriers])
        self.link_s = _link_seconds(network, self.nodes, sent)
        self.links: dict[tuple[int, int], int] = {}  # the row of each link in use
        self.inverse = np.eye(count)
        self.level = 1 + NUDGE * np.arange(count) / count
        self.basis: list[tuple[Part, ...] | None] = [None] * count
        self.bound = float("inf")
        self.done = False

    def solved(self, rounds: int) -> Flow:
        """After so many rounds more; `done` when the prices prove that there is little to gain."""
        for _ in range(rounds):
            if self.done:
                break
            prices = self._prices()
            way = cheapest_way(self.layers, self.pieces, self._priced(prices))
            if way is None:
                self.bound, self.done = 0.0, True
                break
            length, parts = way
            if length > 0:  # prices so scaled that no route costs less than 1 are a proof
                self.bound = min(self.bound, float(prices.sum()) / length)
            near = self._carried() >= (1 - NEAR_ENOUGH) * self.bound
            self.done = near or length >= 1 - NUDGE
            if not self.done:
                self._enter(parts)
        return self.flow()

    def flow(self) -> Flow:
        return Flow(tuple(self._paths()), self.bound)

    def _prices(self) -> Floats:
        """What a second of each row is worth. Time that is left over is worth nothing: a row whose
        price would be below that takes its time back.
        """
        import numpy as np

        while True:
            gains = np.array([column is not None for column in self.basis], dtype=float)
            prices: Floats = gains @ self.inverse
            lowest = int(prices.argmin())
            if prices[lowest] >= -NUDGE:
                return np.maximum(prices, 0.0)
            self._pivot(self.inverse[:, lowest].copy(), None)

    def _priced(self, prices: Floats) -> Costs:
        """Routes cost what the time is worth that they take."""
        import numpy as np

        count = len(self.carriers)
        per_stage = prices[:count]
        hop = np.zeros((count, count))
        if self.link_s is not None:
            for (a, b), row in self.links.items():
                hop[a, b] = self.link_s[a, b] * prices[row]
        nothing = np.zeros(count)
        return Costs(
            nodes=self.nodes,
            fixed=self.fixed * per_stage,
            layer=self.layer * per_stage,
            hop=hop,
            back=None,
            first=nothing,
            last=self.sample * per_stage,
        )

    def _enter(self, parts: tuple[Part, ...]) -> None:
        """Let as much flow over this route as the others can make room for."""
        import numpy as np

        uses = self._used_links(parts)
        takes = np.zeros(len(self.level))
        for stage, run in parts:
            takes[stage] += self.carriers[stage].cost.seconds(run)
        takes[parts[-1][0]] += self.sample[parts[-1][0]]
        for row, seconds in uses:
            takes[row] += seconds
        self._pivot(self.inverse @ takes, parts)

    def _used_links(self, parts: Sequence[Part]) -> list[tuple[int, float]]:
        """Row and seconds of each link on the way that binds; new ones get their row."""
        if self.link_s is None:
            return []
        uses: list[tuple[int, float]] = []
        for (a, _), (b, _) in pairwise(parts):
            if self.link_s[a, b] > 0:
                if (a, b) not in self.links:
                    self._add_row((a, b))
                uses.append((self.links[a, b], float(self.link_s[a, b])))
        return uses

    def _add_row(self, link: tuple[int, int]) -> None:
        import numpy as np

        rows = len(self.level)
        self.links[link] = rows
        grown = np.eye(rows + 1)
        grown[:rows, :rows] = self.inverse
        self.inverse = grown
        self.level = np.append(self.level, 1 + NUDGE * rows / (rows + 1))
        self.basis.append(None)

    def _pivot(self, direction: Floats, column: tuple[Part, ...] | None) -> None:
        """`column` enters the basis for the one that is used up first as it grows."""
        import numpy as np

        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(direction > NUDGE * NUDGE, self.level / direction, np.inf)
        leaving = int(ratios.argmin())
        amount = ratios[leaving]
        self.level = np.maximum(self.level - amount * direction, 0.0)
        self.level[leaving] = amount
        row = self.inverse[leaving] / direction[leaving]
        self.inverse = self.inverse - np.outer(direction, row)
        self.inverse[leaving] = row
        self.basis[leaving] = column

    def _carried(self) -> float:
        flows = zip(self.basis, self.level, strict=True)
        return float(sum(level for parts, level in flows if parts is not None))

    def _paths(self) -> Iterable[Path]:
        for parts, level in zip(self.basis, self.level, strict=True):
            if parts is not None and level > 0:
                hops = tuple((self.nodes[stage], run) for stage, run in parts)
                yield Path(hops, self.compute, float(level))


def _link_seconds(network: Network | None, nodes: tuple[NodeId, ...], sent: float) -> Floats | None:
    """What `sent` tokens take of each link's time [S, S]; None where no link binds."""
    if network is None:
        return None
    _, each = network.tables(nodes)
    return each * sent if each.any() else None
