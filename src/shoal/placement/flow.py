"""The most that stages can carry together, and by which routes: weights for spreading sessions.

Which routes carry how many tokens a second so that no stage computes for more than a second each
second (and no link carries more than it can), and the sum is greatest: `simplex.py` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

from ..units import Slice
from .expect import FULL_BATCH, Network, StageCost, Work, token_s
from .model import Held
from .simplex import Carrier, Flow, Path, Simplex

MAX_ROUNDS = 1000  # each adds a route; what there is then is used
NO_TIME_S = 1e-9  # of a stage that says it takes none


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
        Simplex(layers, merged(carriers), compute).solved(rounds).tokens_per_s
        for compute, carriers in _classes(layers, held, work, batch).items()
    )


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
        self._parts = [Simplex(layers, all_, how, network, ratio) for how, all_ in classes]

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
