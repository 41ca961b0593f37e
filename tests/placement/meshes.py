"""A mesh without a scheduler: nodes come, go and come back, and each decides for itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shoal.bus.coordinates import Coordinates
from shoal.hardware import Speed
from shoal.placement import (
    Decision,
    Member,
    ModelShape,
    Pool,
    Wanted,
    capacities,
    coverable,
    covered,
    decide,
)
from shoal.units import ModelId, NodeId, Slice

MODEL = ModelId("llama")
MOST_ROUNDS = 60


@dataclass
class SmallMesh:
    """Everybody sees everybody; `settle` lets all decide until nobody wants a change."""

    shape: ModelShape
    nodes: dict[NodeId, Member] = field(default_factory=dict)
    whole: bool = False
    moves: int = 0

    def pool(self, nodes: Sequence[Member] | None = None) -> Pool:
        seen = self.nodes.values() if nodes is None else nodes
        return Pool((Wanted(MODEL, self.shape, whole=self.whole),), {MODEL: tuple(seen)})

    def decision(self, node: NodeId) -> Decision:
        return decide(node, self.pool())

    def layers_for(self, node: NodeId) -> Slice | None:
        return self.decision(node).layers

    def settle(self, chance: random.Random, *, at_once: bool = False) -> None:
        for _ in range(MOST_ROUNDS):
            if not self.one_round(chance, at_once=at_once):
                return
        raise AssertionError("the nodes do not come to rest")

    def one_round(self, chance: random.Random, *, at_once: bool = False) -> bool:
        """Each decides once, in any order, or all on the same view. True when anybody moved."""
        order = sorted(self.nodes)
        chance.shuffle(order)
        if at_once:
            chosen = {node: self.layers_for(node) for node in order}
            return any([self.hold(node, layers) for node, layers in chosen.items()])
        return any([self.hold(node, self.layers_for(node)) for node in order])

    def hold(self, node: NodeId, layers: Slice | None) -> bool:
        before = self.nodes[node]
        if layers == before.layers:
            return False
        assert layers is not None, f"{node} gave up {before.layers}"
        self.moves += before.layers is not None
        self.nodes[node] = replace(before, layers=layers)
        return True

    def come_or_go(self, node: NodeId, member: Member) -> None:
        if self.nodes.pop(node, None) is None:
            self.nodes[node] = member

    @property
    def covered(self) -> bool:
        slices = [one.layers for one in self.nodes.values() if one.layers]
        return covered(self.shape.layers, slices, whole=self.whole)

    @property
    def coverable(self) -> bool:
        return coverable(self.shape.layers, [one.capacities for one in self.nodes.values()])


def at(region: int, chance: random.Random | None = None) -> Coordinates:
    """Regions lie 50 ms from each other; the nodes of one within 2 ms."""
    near = [chance.uniform(-0.001, 0.001) if chance else 0.0 for _ in range(2)]
    return Coordinates((region * 0.05 + near[0], near[1], 0.0), error=0.2)


def random_pool(chance: random.Random, most_nodes: int = 10, most_layers: int = 24) -> SmallMesh:
    """A mesh in which all nodes are free, with room around what the model takes."""
    layers, count = chance.randint(3, most_layers), chance.randint(1, most_nodes)
    tied, embed = chance.random() < 0.3, chance.randint(0, 30)
    sizes = tuple(chance.choice((10, chance.randint(5, 15))) for _ in range(layers))
    head = embed + 2 if tied else chance.randint(0, 40)
    shape = ModelShape(sizes, embed, head, tied, 1)
    share = chance.choice((1.0, 1.1, 1.3, 2.0, 3.0)) * (sum(sizes) + embed + head) / count
    regions = chance.choice((1, 1, 2, 3))
    mesh = SmallMesh(shape)
    for i in range(count):
        node = NodeId(f"n{i:02}")
        room = int(share * chance.choice((0.3, 1.0, 1.0, 2.0, 2 * chance.random())))
        speed = Speed(layer_s=chance.choice((1, 2, 5, 10)) * 1e-4, token_s=1e-6, step_s=1e-4)
        place = at(chance.randrange(regions), chance)
        mesh.nodes[node] = Member(node, capacities(shape, room, 0), speed=speed, place=place)
    return mesh
