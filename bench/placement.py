"""Placement without a scheduler: random pools in arrival order, with nodes that leave and return.

Every node runs `placement.decide` on what it sees, until nobody wants a change. Reported: how often
a model that could be covered is; what each event moves; what the layout that came about carries
against one planned at once; how long a decision takes with 100 and with 10,000 nodes; and, with two
regions in random order, how long a ring is and how many cross. The same arrivals are placed by the
Petals rule and by capacity alone (`rules.py`).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import thread_time

from contract import Bench, percentile
from rules import NoChain, Peer, place_by_capacity, place_by_weakest

from shoal.bus.coordinates import Coordinates
from shoal.hardware import Speed
from shoal.placement import (
    Member,
    ModelShape,
    Pool,
    Wanted,
    capacities,
    coverable,
    covered,
    decide,
)
from shoal.placement.arrange import Laid, throughput
from shoal.placement.decide import forget
from shoal.placement.rates import tokens_per_s
from shoal.units import ModelId, NodeId, Slice

MODEL = ModelId("model")
LAYER_BYTES = 1_000_000_000
KV_BYTES = 16_384
MOST_ROUNDS = 60
ASKED = 8  # nodes, after each event
HOP_S, CROSS_S = 0.001, 0.050
SPEEDS = {8: 8.0, 16: 6.0, 24: 4.0, 40: 1.0}  # memory in GB: ms a layer
NO_CHAIN: dict[NodeId, Slice] = {}


@dataclass
class Mesh:
    """Nodes that see each other, and what their decisions cost."""

    shape: ModelShape
    nodes: dict[NodeId, Member] = field(default_factory=dict)
    moves: int = 0
    layers_moved: int = 0
    bytes_moved: int = 0
    seconds: list[float] = field(default_factory=list)

    def settle(self, chance: random.Random) -> bool:
        """Let nodes decide, in random order, until nobody wants a change. False: they never stop.

        In a large mesh some of them are asked, those that are free among them, and all only when
        one of these changes anything.
        """
        for _ in range(MOST_ROUNDS):
            order = chance.sample(sorted(self.nodes), len(self.nodes))
            free = [node for node in order if self.nodes[node].layers is None]
            some = any([self._decide(node) for node in (*free, *order[:ASKED])])
            if not some and (len(order) <= ASKED or covered(self.shape.layers, self.slices)):
                return True
            if not any([some, *(self._decide(node) for node in order[ASKED:])]):
                return True
        return False

    def _decide(self, node: NodeId) -> bool:
        pool = Pool((Wanted(MODEL, self.shape),), {MODEL: tuple(self.nodes.values())})
        started = thread_time()
        wanted = decide(node, pool).layers
        self.seconds.append(thread_time() - started)
        now = self.nodes[node]
        if wanted in (now.layers, None):
            return False
        if now.layers is not None:
            self.moves += 1
            self.layers_moved += len(set(wanted) - set(now.layers))
            self.bytes_moved += self.shape.moved_bytes(wanted, now.layers)
        self.nodes[node] = replace(now, layers=wanted)
        return True

    @property
    def slices(self) -> list[Slice]:
        return [one.layers for one in self.nodes.values() if one.layers]

    @property
    def coverable(self) -> bool:
        return coverable(self.shape.layers, [one.capacities for one in self.nodes.values()])

    def carries(self) -> float:
        """Tokens/s of the layout, network aside."""
        return carried(self.shape, self.nodes, {n: m.layers for n, m in self.nodes.items()})


def carried(
    shape: ModelShape, nodes: dict[NodeId, Member], placed: dict[NodeId, Slice | None]
) -> float:
    laid = [
        Laid(part, tokens_per_s(shape, nodes[node], len(part)))
        for node, part in placed.items()
        if part
    ]
    return throughput(shape.layers, laid)


def shape_of(layers: int) -> ModelShape:
    ends = LAYER_BYTES // 2
    return ModelShape((LAYER_BYTES,) * layers, ends, ends, False, KV_BYTES)


def node_of(shape: ModelShape, name: str, gigabytes: float, layer_ms: float, region: int) -> Member:
    memory = int(gigabytes * 1e9)
    place = Coordinates((region * CROSS_S, 0.0, 0.0), error=0.2)
    speed = Speed(step_s=0.0005, layer_s=layer_ms / 1e3, token_s=layer_ms / 2e5)
    room = capacities(shape, memory, 4096)
    return Member(NodeId(name), room, speed=speed, memory_bytes=memory, place=place, pinned=False)


def random_pool(chance: random.Random, count: int, layers: int) -> tuple[ModelShape, list[Member]]:
    """Two to four classes of machines with just too little room in all, or up to three times the
    room that the model takes; where there are many, with room for three layers each, on average.
    """
    shape = shape_of(layers)
    classes = chance.sample(sorted(SPEEDS), chance.randint(2, 4))
    drawn = [chance.choice(classes) for _ in range(count)]
    ample = chance.choice((0.95, 1.1, 1.3, 2.0, 3.0)) * (layers + 1) / sum(drawn)
    ample = max(ample, 3.0 * count / sum(drawn)) if count > layers / 2 else ample
    regions = chance.choice((1, 1, 2, 3))
    return shape, [
        node_of(
            shape,
            f"n{i:03}",
            size * ample,
            SPEEDS[size] * chance.uniform(0.9, 1.1),
            chance.randrange(regions),
        )
        for i, size in enumerate(drawn)
    ]


def histories(bench: Bench) -> None:
    """Coverage, moves and rest, over many random histories."""
    sizes = ((6, 60), (12, 40), (24, 12), (48, 5), (100, 2), (200, 1))
    failed = restless = 0
    for count, pools in sizes[:4] if bench.quick else sizes:
        chance = random.Random(count)
        events = held = 0
        meshes: list[Mesh] = []
        ratios: dict[str, list[float]] = {"planned": [], "petals": [], "capacity": []}
        for _ in range(max(1, pools // 6 if bench.quick else pools)):
            shape, pool = random_pool(chance, count, chance.choice((16, 32, 60, 80, 96)))
            mesh = Mesh(shape)
            for one in came_and_went(chance, pool):
                if mesh.nodes.pop(one.node, None) is None:
                    mesh.nodes[one.node] = one
                restless += not mesh.settle(chance)
                events += 1
                held += mesh.coverable
                failed += covered(shape.layers, mesh.slices) != mesh.coverable
            meshes.append(mesh)
            if mesh.coverable:
                compare(mesh, ratios)
        bench.row(
            what=f"{count} nodes",
            events=events,
            coverable=held,
            moves_per_event=sum(mesh.moves for mesh in meshes) / events,
            layers_moved_per_event=sum(mesh.layers_moved for mesh in meshes) / events,
            GB_moved_per_event=sum(mesh.bytes_moved for mesh in meshes) / 1e9 / events,
            decision_ms_p50=1e3 * statistics.median(s for mesh in meshes for s in mesh.seconds),
            **{f"of_{name}": statistics.mean(of) for name, of in ratios.items() if of},
        )
    bench.aim("coverable, and not covered", "0 events", got=failed, holds=failed == 0)
    bench.aim("nodes that do not come to rest", "0 events", got=restless, holds=restless == 0)


def came_and_went(chance: random.Random, pool: Sequence[Member]) -> list[Member]:
    """All arrive in random order; then some leave, and some of those come back."""
    arrivals = chance.sample(list(pool), len(pool))
    return arrivals + chance.choices(list(pool), k=max(4, len(pool) // 4))


def compare(mesh: Mesh, ratios: dict[str, list[float]]) -> None:
    """What came about one by one, over what others would have laid with all nodes known."""
    shape, nodes = mesh.shape, mesh.nodes
    ours = mesh.carries()
    fresh = Mesh(shape, {node: replace(one, layers=None) for node, one in nodes.items()})
    pool = Pool((Wanted(MODEL, shape),), {MODEL: tuple(fresh.nodes.values())})
    planned = carried(shape, nodes, {node: decide(node, pool).layers for node in nodes})
    peers = [
        Peer(one.node, one.capacities.middle, one.speed.layer_s, 1 / one.speed.layer_s)
        for one in nodes.values()
        if one.capacities.middle
    ]
    if planned:
        ratios["planned"].append(ours / planned)
    by_capacity = NO_CHAIN
    with suppress(NoChain):
        by_capacity = place_by_capacity(shape.layers, peers)
    by_weakest, _ = place_by_weakest(shape.layers, peers)
    for name, placed in (("petals", by_weakest), ("capacity", by_capacity)):
        other = carried(shape, nodes, dict(placed))
        if other:
            ratios[name].append(ours / other)


def decisions(bench: Bench) -> None:
    """How long one node thinks, when it serves and when it and others are free."""
    for count, most_s in ((100, 0.05), (10_000, 1.0)):
        for free in (1, count // 10, count):
            chance = random.Random(count + free)
            shape = shape_of(80)
            members = [
                node_of(shape, f"n{i:05}", chance.choice(sorted(SPEEDS)) * chance.uniform(0.8, 1),
                        chance.uniform(1, 8), chance.randrange(4))
                for i in range(count)
            ]  # fmt: skip
            pool = Pool(
                (Wanted(MODEL, shape),),
                {MODEL: [one if i < free else placed(chance, shape, one)
                         for i, one in enumerate(members)]},
            )  # fmt: skip
            taken = [
                timed(node, pool)
                for node in (members[0].node, members[-1].node)
                for _ in range(3 if bench.quick else 9)
            ]
            middle = percentile(taken, 50)
            bench.row(what=f"decision, {count} nodes, {free} free", decision_ms_p50=1e3 * middle)
            bench.aim(
                f"a decision among {count} nodes, {free} free, takes at most {most_s} s",
                "1 (yes)",
                got=float(middle <= most_s),
                holds=middle <= most_s,
            )


def placed(chance: random.Random, shape: ModelShape, one: Member) -> Member:
    most = max(1, one.capacities.middle)
    start = chance.randrange(shape.layers - most + 1)
    return replace(one, layers=Slice(start, start + most))


def timed(node: NodeId, pool: Pool) -> float:
    forget()
    started = thread_time()
    decide(node, pool)
    return thread_time() - started


def two_regions(bench: Bench) -> None:
    """Equal nodes of two regions, either of which could hold whole rings, arrive in any order."""
    longer: list[float] = []
    crossing: list[float] = []
    others: list[float] = []
    for seed in range(3 if bench.quick else 20):
        chance = random.Random(seed)
        shape = shape_of(32)
        nodes = [node_of(shape, f"n{i:02}", 10.0, 2.0, i % 2) for i in range(16)]
        mesh = Mesh(shape)
        for one in chance.sample(nodes, len(nodes)):
            mesh.nodes[one.node] = one
            mesh.settle(chance)
        homes = {one.node: i % 2 for i, one in enumerate(nodes)}
        parts = {node: one.layers for node, one in mesh.nodes.items() if one.layers}
        rtt, share = rings(shape.layers, parts, homes)
        stages = -(-shape.layers // nodes[0].capacities.middle)
        longer.append(rtt / (HOP_S * stages))
        crossing.append(share)
        peers = [Peer(one.node, one.capacities.middle, 0.002) for one in mesh.nodes.values()]
        others.append(rings(shape.layers, dict(place_by_weakest(shape.layers, peers)[0]), homes)[1])
    bench.row(
        what="two regions",
        ring_over_best=statistics.mean(longer),
        rings_that_cross=statistics.mean(crossing),
        petals_rings_that_cross=statistics.mean(others),
    )
    share = statistics.mean(crossing)
    bench.aim("share of rings that cross regions", "0", got=share, holds=share == 0)


def rings(layers: int, parts: dict[NodeId, Slice], homes: dict[NodeId, int]) -> tuple[float, float]:
    """The mean over first stages of the shortest ring's network time, and the share that cross."""
    lengths = [
        shortest(layers, parts, homes, first)
        for first, part in sorted(parts.items())
        if part.start == 0
    ]
    found = [length for length in lengths if length < math.inf]
    return statistics.mean(found), sum(length > CROSS_S for length in found) / len(found)


def shortest(
    layers: int, parts: dict[NodeId, Slice], homes: dict[NodeId, int], first: NodeId
) -> float:
    """Network time of the best ring that begins there, by how far it got and where it is."""
    best: dict[tuple[int, NodeId], float] = {(parts[first].stop, first): 0.0}
    done: dict[NodeId, float] = {}
    for reached in range(1, layers + 1):
        here = {node: cost for (at, node), cost in best.items() if at == reached}
        if reached == layers:
            done = here
        for node, cost in here.items():
            for other, part in parts.items():
                if part.start <= reached < part.stop:
                    key = part.stop, other
                    new = cost + hop(homes, node, other)
                    best[key] = min(best.get(key, math.inf), new)
    return min((cost + hop(homes, node, first) for node, cost in done.items()), default=math.inf)


def hop(homes: dict[NodeId, int], a: NodeId, b: NodeId) -> float:
    if a == b:
        return 0.0
    return HOP_S if homes[a] == homes[b] else CROSS_S


def main() -> None:
    bench = Bench("placement", __doc__)
    histories(bench)
    decisions(bench)
    two_regions(bench)
    bench.finish()


if __name__ == "__main__":
    main()
