"""How many layers fit on a node."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from ..units import Slice

if TYPE_CHECKING:
    from .model import ModelShape

End = Literal["middle", "embedding", "head", "both"]


@dataclass(frozen=True, slots=True)
class Capacities:
    """How many layers fit: anywhere, after the embedding, before the head, between both."""

    middle: int
    embedding: int
    head: int
    both: int

    def stops(self, start: int, layers: int) -> range:
        """Where a slice from `start` may stop short of the model's end."""
        room = self.embedding if start == 0 else self.middle
        return range(start + 1, min(start + room, layers - 1) + 1)

    def reaches_end(self, start: int, layers: int) -> bool:
        """True when all from `start` to the head fits."""
        return start + (self.both if start == 0 else self.head) >= layers

    def fits(self, wanted: Slice, layers: int) -> bool:
        """True when `wanted`, a slice of a model of so many layers, fits."""
        if wanted.stop == layers:
            return self.reaches_end(wanted.start, layers)
        return wanted.stop in self.stops(wanted.start, layers)


def capacity(shape: ModelShape, memory_bytes: int, kv_tokens: int, end: End) -> int:
    """Layers that fit into `memory_bytes` beside `end`, wherever they are, KV room included.

    The KV cache of each layer, `kv_tokens` long, is reserved first: a node full of weights serves
    nobody. Where layers differ in size the heaviest ones count.
    """
    return bisect_right(_needed(shape, kv_tokens, end), memory_bytes)


@lru_cache(maxsize=64)  # thousands of nodes are asked about the same few models
def _needed(shape: ModelShape, kv_tokens: int, end: End) -> tuple[int, ...]:
    """Bytes that 1, 2, ... layers take at this place."""
    layers = shape.layers
    kv_bytes = kv_tokens * shape.kv_bytes_per_token_per_layer
    sums = list(accumulate((size + kv_bytes for size in shape.layer_bytes), initial=0))
    ends = shape.ends_bytes(embedding=end in ("embedding", "both"), head=end in ("head", "both"))

    def heaviest(count: int) -> int:
        if end == "embedding":
            return sums[count] + ends
        if end == "head":
            return sums[-1] - sums[layers - count] + ends
        windows = (sums[a + count] - sums[a] for a in range(layers - count + 1))
        return max(windows) + ends

    return tuple(map(heaviest, range(1, layers + 1)))


def capacities(shape: ModelShape, memory_bytes: int, kv_tokens: int) -> Capacities:
    """What fits at each place of the model."""
    return Capacities(
        middle=capacity(shape, memory_bytes, kv_tokens, "middle"),
        embedding=capacity(shape, memory_bytes, kv_tokens, "embedding"),
        head=capacity(shape, memory_bytes, kv_tokens, "head"),
        both=capacity(shape, memory_bytes, kv_tokens, "both"),
    )
