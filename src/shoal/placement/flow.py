"""The most that stages can carry together, and by which routes: weights for spreading sessions.

Which routes carry how many tokens a second so that no stage computes for more than a second each
second (and no link carries more than it can), and the sum is greatest: a linear programme with a
variable for every route. There are far too many to write down, so routes are generated: the simplex
method needs just the one route that is cheapest at the present prices of the stages, which is what
`ring.py` finds. At the end the prices prove how far from the optimum the sum can be (Dantzig and
Wolfe 1960; Gilmore and Gomory 1961).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

from ..units import NodeId, Slice
from .expect import FULL_BATCH, Network, StageCost, Work, token_s
from .model import Held
from .ring import Costs, Part, Piece, cheapest_way

if TYPE_CHECKING:
    from .ring import Floats

NEAR_ENOUGH = 0.01  # of the optimum
MAX_ROUNDS = 1000  # each adds a route; what there is then is used
NO_TIME_S = 1e-9  # of a stage that says it takes none
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


def best_flow(
    layers: int,
    held: Iterable[Held],
    work: Work,
    network: Network | None = None,
    batch: int = FULL_BATCH,
) -> Flow:
    """The mixture of routes that carries the most of such work, each stage at that batch.

    All classes count, each for itself. Links bind where `network` knows their bandwidth.
    """
    search = FlowSearch(layers, held, work, network, batch)
    search.advance(MAX_ROUNDS)
    return search.flow()


def all_together(
    layers: int,
    held: Iterable[Held],
    work: Work,
    batch: int = FULL_BATCH,
    rounds: int = MAX_ROUNDS,
) -> float:
    """The tokens a second that the stages carry together, quickly: those that hold the same layers
    are taken for one as fast as all of them. With few `rounds` it may be more than is found.
    """
    return sum(
        _Simplex(layers, merged(carriers), compute).solved(rounds).tokens_per_s
        for compute, carriers in _classes(layers, held, work, batch).items()
    )


@dataclass(frozen=True, slots=True)
class Carrier:
    """A stage, and what a token takes of its time."""

    node: NodeId
    layers: Slice
    whole: bool
    cost: StageCost


def _classes(layers: int, held: Iterable[Held], work: Work, batch: int) -> dict[str, list[Carrier]]:
    classes: dict[str, list[Carrier]] = {}
    for stage in sorted(held, key=lambda one: (one.compute, one.layers, one.node)):
        if stage.state == "serving" and stage.layers.stop <= layers:
            cost = _not_nothing(token_s(stage, work, batch))
            carrier = Carrier(stage.node, stage.layers, stage.whole, cost)
            classes.setdefault(stage.compute, []).append(carrier)
    return classes


def merged(carriers: Iterable[Carrier]) -> list[Carrier]:
    """One for each slice, as fast as all that hold it together."""
    groups: dict[tuple[Slice, bool], list[Carrier]] = {}
    for carrier in carriers:
        groups.setdefault((carrier.layers, carrier.whole), []).append(carrier)
    return [_as_one(group) for group in groups.values()]


def _as_one(group: Sequence[Carrier]) -> Carrier:
    first = group[0]
    rate = sum(1 / one.cost.seconds(one.layers) for one in group)
    less = 1 / rate / first.cost.seconds(first.layers)
    cost = first.cost
    scaled = StageCost(cost.fixed * less, cost.layer * less, cost.sample * less)
    return Carrier(first.node, first.layers, first.whole, scaled)


class FlowSearch:
    """Looks for the best mixture in small strides: there is one to use at any time, and it gets
    better until `done`.
    """

    def __init__(
        self,
        layers: int,
        held: Iterable[Held],
        work: Work,
        network: Network | None = None,
        batch: int = FULL_BATCH,
    ) -> None:
        classes = _classes(layers, held, work, batch).items()
        ratio = 1 + work.prompt / max(work.tokens, 1)
        self._parts = [_Simplex(layers, all_, how, network, ratio) for how, all_ in classes]

    @property
    def done(self) -> bool:
        return all(part.done for part in self._parts)

    def advance(self, rounds: int) -> None:
        for part in self._parts:
            part.solved(rounds)

    def flow(self) -> Flow:
        flows = [part.flow() for part in self._parts]
        paths = tuple(path for flow in flows for path in flow.paths)
        return Flow(paths, sum(flow.bound for flow in flows))


class _Simplex:
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


def _not_nothing(cost: StageCost) -> StageCost:
    return StageCost(cost.fixed, max(cost.layer, NO_TIME_S), cost.sample)


class Rotation:
    """Turns in proportion to the weights, spread as evenly as can be: whoever is furthest behind
    its share is next. Where to begin is chance, so that gateways do not go in step.
    """

    def __init__(self, paths: Sequence[Path], chance: Random) -> None:
        self.paths = tuple(paths)
        self._chance = chance
        total = sum(path.tokens_per_s for path in paths)
        self._shares = [path.tokens_per_s / total for path in paths]
        self._behind = [share * chance.random() for share in self._shares]

    def with_paths(self, paths: Sequence[Path]) -> Rotation:
        """The same turns with other shares: who was behind still is."""
        new = Rotation(paths, self._chance)
        behind = {path.parts: n for path, n in zip(self.paths, self._behind, strict=True)}
        new._behind = [behind.get(path.parts, new._behind[n]) for n, path in enumerate(new.paths)]
        return new

    def next(self, open_to: Callable[[Path], bool]) -> Path | None:
        """The next path of those that `open_to` lets through; None when there is none."""
        ready = [n for n, path in enumerate(self.paths) if open_to(path)]
        if not ready:
            return None
        shared = sum(self._shares[n] for n in ready)
        for n in ready:
            self._behind[n] += self._shares[n] / shared
        chosen = max(ready, key=lambda n: self._behind[n])
        self._behind[chosen] -= 1.0
        return self.paths[chosen]
