"""Small pools of nodes for hypothesis, and the slow, obvious way to the same answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

from hypothesis import strategies as st

from shoal.hardware import Speed
from shoal.placement import Capacities, Held, Member, ModelShape, capacities
from shoal.units import NodeId, Slice

AMBER, BIRCH, CEDAR, DELTA = map(NodeId, ("amber", "birch", "cedar", "delta"))
NOWHERE = Capacities(0, 0, 0, 0)


def even(layers: int, *, embed: int = 2, head: int = 3) -> ModelShape:
    """A model with layers of 10 bytes."""
    return ModelShape((10,) * layers, embed, head, kv_bytes_per_token_per_layer=1)


def roomy(layers: int) -> Capacities:
    return Capacities(layers, layers, layers, layers)


@st.composite
def shapes(draw: st.DrawFn, max_layers: int = 8) -> ModelShape:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=max_layers))
    embed, norm = draw(st.integers(0, 20)), draw(st.integers(0, 3))
    tied = draw(st.booleans())
    head = embed + norm if tied else draw(st.integers(0, 20))
    return ModelShape(tuple(sizes), embed, head, tied, kv_bytes_per_token_per_layer=1)


@st.composite
def mixed_pools(
    draw: st.DrawFn, max_nodes: int = 6, max_layers: int = 8
) -> tuple[ModelShape, dict[NodeId, Capacities]]:
    """A model and nodes whose memory is around what it takes to hold their share of it."""
    shape = draw(shapes(max_layers))
    count = draw(st.integers(1, max_nodes))
    share = 2 * (sum(shape.layer_bytes) + shape.embed_bytes + shape.head_bytes) // count
    equal = draw(st.booleans())
    first = draw(st.integers(0, share))
    memory = [first if equal else draw(st.integers(0, share)) for _ in range(count)]
    names = draw(st.permutations([NodeId(f"n{i}") for i in range(count)]))
    return shape, {
        name: capacities(shape, size, kv_tokens=0) for name, size in zip(names, memory, strict=True)
    }


@st.composite
def picky_pools(draw: st.DrawFn) -> tuple[ModelShape, dict[NodeId, Capacities]]:
    """Larger pools with just enough room, in which few nodes can take an end."""
    layers, count = draw(st.integers(6, 12)), draw(st.integers(5, 7))
    ends = st.sampled_from([0, 0, 0, 1, 2])
    room = st.integers(1, 2 * layers // count)
    sizes = [Capacities(draw(room), draw(ends), draw(ends), 0) for _ in range(count)]
    return even(layers), {NodeId(f"n{i}"): one for i, one in enumerate(sizes)}


def slices(layers: int) -> list[Slice]:
    return [Slice(a, b) for a in range(layers) for b in range(a + 1, layers + 1)]


def can_cover(layers: int, pool: Sequence[Capacities]) -> bool:
    """Lay the nodes end to end in every order, each with every length."""

    def lay(start: int, order: Sequence[Capacities]) -> bool:
        return start == layers or any(
            lay(stop, order[1:])
            for stop in range(start + 1, layers + 1)
            if order and order[0].fits(Slice(start, stop), layers)
        )

    subsets = (order for size in range(len(pool) + 1) for order in permutations(pool, size))
    return any(lay(0, order) for order in subsets)


def member(node: NodeId, capacities: Capacities, layers: Slice | None = None) -> Member:
    return Member(node, capacities, layers)


def stage(
    node: NodeId,
    start: int,
    stop: int,
    *,
    seconds: float = 0.001,
    overhead: float = 0.0,
    queue: int = 0,
    free: int = 1000,
    compute: str = "f32",
    state: str = "serving",
    whole: bool = False,
    sample: float = 0.0,
) -> Held:
    return Held(
        node,
        Slice(start, stop),
        state,  # type: ignore[arg-type]
        compute,
        Speed(layer_s=seconds, step_s=overhead, sample_s=sample),
        0,
        queue,
        free,
        whole,
    )


Ring = tuple[tuple[Held, Slice], ...]


def rings(held: list[Held], layers: int, start: int = 0) -> Iterator[Ring]:
    """Every way to run all layers, each node once."""
    if start == layers:
        yield ()
    for one in held:
        if not one.layers.start <= start < one.layers.stop or one.whole > (
            one.layers.start == start
        ):
            continue
        others = [each for each in held if each is not one]
        for stop in range(start + 1, one.layers.stop + 1):
            if not one.whole or stop == one.layers.stop:
                for rest in rings(others, layers, stop):
                    yield ((one, Slice(start, stop)), *rest)
