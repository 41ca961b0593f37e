"""What placement needs to know of a model and of the nodes, free of everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from ..bus.coordinates import Coordinates
from ..hardware import Speed
from ..units import ModelId, NodeId, Slice
from .capacity import Capacities

State = Literal["joining", "serving", "draining"]


@dataclass(frozen=True)
class ModelShape:
    """Bytes of a model's parts as they will lie in memory.

    When `tied`, embedding and head share a matrix: `head_bytes` includes it, and a stage with both
    ends holds it once. A layer's bytes include its experts', of which each token is sent to the
    share `routed`.
    """

    layer_bytes: tuple[int, ...]
    embed_bytes: int
    head_bytes: int
    tied: bool = False
    kv_bytes_per_token_per_layer: int = 0
    experts_bytes: int = 0  # of one layer
    routed: float = 0.0

    @classmethod
    def measured(
        cls, layer_bytes: Sequence[int], slice_bytes: Callable[[Slice], int], kv_bytes: int
    ) -> ModelShape:
        """From a checkpoint's own sums: `slice_bytes` includes the ends that a slice has."""
        layers = len(layer_bytes)
        whole = slice_bytes(Slice(0, layers)) - sum(layer_bytes)
        if layers == 1:
            return cls(tuple(layer_bytes), 0, whole, False, kv_bytes)
        embed = slice_bytes(Slice(0, 1)) - layer_bytes[0]
        head = slice_bytes(Slice(layers - 1, layers)) - layer_bytes[-1]
        return cls(tuple(layer_bytes), embed, head, whole < embed + head, kv_bytes)

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    @cached_property
    def sums(self) -> tuple[int, ...]:
        """Bytes of the first n layers, for n from 0 to all."""
        return tuple(accumulate(self.layer_bytes, initial=0))

    def ends_bytes(self, *, embedding: bool, head: bool) -> int:
        """Bytes beside the layers of a stage with these ends."""
        sizes = (self.embed_bytes * embedding, self.head_bytes * head)
        return max(sizes) if self.tied else sum(sizes)

    def slice_bytes(self, layers: Slice) -> int:
        """All weights of a stage, ends included."""
        ends = self.ends_bytes(embedding=layers.start == 0, head=layers.stop == self.layers)
        return self.sums[layers.stop] - self.sums[layers.start] + ends

    def moved_bytes(self, new: Slice, old: Slice | None) -> int:
        """Bytes to load for `new` on a node that holds `old`."""
        if old is None:
            return self.slice_bytes(new)
        start, stop = max(new.start, old.start), min(new.stop, old.stop)
        kept = self.sums[stop] - self.sums[start] if start < stop else 0
        return self.sums[new.stop] - self.sums[new.start] - kept + self._moved_ends(new, old)

    def _moved_ends(self, new: Slice, old: Slice) -> int:
        ends, had = ((part.start == 0, part.stop == self.layers) for part in (new, old))
        return self.added_ends(ends, had)

    def added_ends(self, ends: tuple[bool, bool], had: tuple[bool, bool]) -> int:
        """Bytes of embedding and head to load for these ends where those are there already."""
        if not self.tied:
            return self.ends_bytes(embedding=ends[0] > had[0], head=ends[1] > had[1])
        there = self.ends_bytes(embedding=had[0], head=had[1])
        return max(0, self.ends_bytes(embedding=ends[0], head=ends[1]) - there)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that somebody asks for or serves, in the compute class at hand."""

    model: ModelId
    shape: ModelShape
    demand: float = 0.0  # tokens/s that are asked for in the whole mesh
    kv_tokens: int = 4096  # room that each node keeps beside its weights
    whole: bool = False  # its engines run all layers of a slice or none: slices must meet


@dataclass(frozen=True, slots=True)
class Member:
    """A node that holds layers of a model, or could. Leave out nodes that are draining.

    `layers` is what it serves or is loading, None when it holds nothing of this model: it is free,
    or serves the model `elsewhere`. A pinned node never moves.
    """

    node: NodeId
    capacities: Capacities
    layers: Slice | None = None
    pinned: bool = False
    state: State = "serving"
    speed: Speed = Speed(layer_s=0.001)  # of the stage, or predicted
    memory_bytes: int = 0  # for weights and KV together; 0 = unknown
    place: Coordinates = Coordinates()
    elsewhere: ModelId | None = None


@dataclass(frozen=True)
class Pool:
    """The mesh as one node sees it: of each model those who hold it or could."""

    wanted: tuple[Wanted, ...]
    members: Mapping[ModelId, Sequence[Member]]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a node should hold; None = nothing fits, or nothing is needed of it.

    It is to be acted upon once it has come out the same for `wait_s` seconds.
    """

    model: ModelId | None
    layers: Slice | None
    wait_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """A stage as routing sees it."""

    node: NodeId
    layers: Slice
    state: State
    compute: str
    speed: Speed
    sessions: int  # that run
    queue: int  # that wait for their turn
    free_tokens: int  # room in the KV cache
    whole: bool = False  # it runs all of its layers or none

    @property
    def step_seconds(self) -> float:
        """What one token costs here, with those that wait before it."""
        return self.speed.seconds(len(self.layers)) * (1 + self.queue)

    @property
    def layer_seconds(self) -> float:
        """The same for each of its layers."""
        return self.step_seconds / len(self.layers)
