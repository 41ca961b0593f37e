"""The published clusters for the simulator: machines by their profiles, links, requests.

Data and where they come from: `data/helix/README.md`.
"""

from __future__ import annotations

import csv
import json
import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shoal.hardware import Capability, Speed
from shoal.placement.bound import Mixture
from shoal.placement.cost import predict
from shoal.sim.model import SimModel
from shoal.transport.memory import Path as LinkPath
from shoal.units import Slice

DATA = Path(__file__).parent / "data" / "helix"
LAYER_BYTES = {"llama-30b": 1_070_000_000, "llama-70b": 1_711_000_000}  # 16-bit, by the shapes
KV_BYTES = {"llama-30b": 26_624, "llama-70b": 4_096}  # of a token in a layer, 16-bit
KV_TOKENS = {"llama-30b": 40_000, "llama-70b": 280_000}  # that a node keeps room for
TFLOPS = {"A100": 312, "V100": 125, "L4": 121, "L4x2": 242, "T4": 65, "T4x2": 130, "T4x4": 260}
CONTEXT = 1000  # tokens that a decode token attended to when it was measured
MAX_BATCH = 64  # rows of a step
PRICE_OF_ONE = 2  # a batch of one decode token takes as long as one of two

Points = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Profile:
    """One kind of machine with one model: milliseconds of a layer, from published measurements."""

    kind: str
    max_layers: int
    kv_blocks: Sequence[int]
    decode_max_tokens: Sequence[int]
    prompt_max_requests: int
    prompt_ms: Points
    decode_ms: Points

    def layer_s(self, decoding: int, prompt_tokens: int) -> float:
        """Seconds of a layer for a batch: both kinds of rows, one after the other."""
        sequences = max(decoding, PRICE_OF_ONE) if decoding else 0
        return (between(self.decode_ms, sequences) + between(self.prompt_ms, prompt_tokens)) / 1000

    def kv_tokens(self, layers: int) -> int:
        """Room of each of so many layers; what a machine holds beyond the table is not known."""
        return 16 * self.kv_blocks[layers - 1]

    def decode_s(self, batch: float) -> float:
        """Of one sequence's token in one layer, in a batch of so many."""
        return between(self.decode_ms, max(batch, PRICE_OF_ONE)) / max(batch, 1) / 1000

    def per_token_s(self, mixture: Mixture, batch: float) -> float:
        """Of a layer and answered token, its share of the prompt included."""
        prompt_s = between(self.prompt_ms, mixture.prompt) / 1000
        return mixture.seconds(prompt_s, self.decode_s(batch))

    def memory_bytes(self, model: str) -> int:
        """What gives the published KV room at the most layers."""
        weights = self.max_layers * LAYER_BYTES[model]
        return weights + self.max_layers * self.kv_tokens(self.max_layers) * KV_BYTES[model]

    def cheapest(self, mixture: Mixture) -> tuple[float, float]:
        """Seconds of a layer and step, and of each token in it (its share of the prompt too): the
        line that no batch up to MAX_BATCH comes below, the highest one in the middle.
        """
        points = [(n, ms) for n, ms in self.decode_ms if PRICE_OF_ONE <= n <= MAX_BATCH]
        lines = [
            ((y1 - y0) / (x1 - x0), y0 - x0 * (y1 - y0) / (x1 - x0))
            for x0, y0 in points
            for x1, y1 in points
            if x1 > x0
        ]
        below = [
            (slope, at_none)
            for slope, at_none in lines
            if slope >= 0 and all(slope * n + at_none <= ms + 1e-9 for n, ms in points)
        ]
        slope, at_none = max(below, key=lambda line: line[1] + line[0] * MAX_BATCH / 4)
        prompt_ms = min(ms / n for n, ms in self.prompt_ms if 0 < n <= 1000) * mixture.prompt
        return at_none / 1000, mixture.seconds(prompt_ms / 1000, slope / 1000)

    @property
    def speed(self) -> Speed:
        """The cost formula's nearest: decode steps cost more a token than prompts, for what each
        of their tokens attends to.
        """
        decode, at_none = _line([(n, ms) for n, ms in self.decode_ms if 0 < n <= 200])
        prompt, _ = _line([(n, ms) for n, ms in self.prompt_ms if 0 < n <= 1000])
        token = min(decode, prompt)
        context = (decode - token) / CONTEXT
        return Speed(layer_s=at_none / 1000, token_s=token / 1000, context_s=context / 1000)


@cache
def capability(model: str, kind: str) -> Capability:
    """What such a machine measures of itself: memory and arithmetic for which the cost formula
    foretells the time of a layer and of each token in it.
    """
    speed, shape = profiles(model)[kind].speed, sim_model(model).shape
    unit = predict(Capability(memory_bytes_per_s=1.0, int8_ops=1.0), shape, "int8")
    return Capability(
        memory_bytes_per_s=unit.layer_s / speed.layer_s, int8_ops=unit.token_s / speed.token_s
    )


def between(points: Points, x: float) -> float:
    """On the straight line between two points; beyond the last one its line goes on."""
    at = min(max(1, bisect_left(points, x, key=lambda point: point[0])), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return float(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return slope, mean_y - slope * mean_x


@cache
def profiles(model: str) -> Mapping[str, Profile]:
    known = _read("profiles.json")["models"][model]["machines"]
    return {kind: Profile(kind, **known[kind]) for kind in known}


@cache
def sim_model(model: str) -> SimModel:
    known = _read("profiles.json")["models"][model]
    layers = (LAYER_BYTES[model],) * known["layers"]
    return SimModel(model, layers, KV_BYTES[model], known["activation_bytes"])


def printed(cell: str) -> Mapping[str, Any]:
    """What Helix's own simulator says of a cell, such as "geo 70b"."""
    found: Mapping[str, Any] = _read("printed.json")["cells"].get(cell, {})
    return found


def placement(cell: str) -> Sequence[tuple[str, Slice]]:
    """Kind of machine and slice, as Helix's solver placed them; empty where that is not known."""
    found = _read("placements.json")["cells"].get(cell, [])
    return [(kind, Slice(start, stop)) for kind, start, stop in found]


@cache
def _read(name: str) -> Any:
    return json.loads((DATA / name).read_text())


# ---- requests


@cache
def lengths() -> Sequence[tuple[int, int]]:
    """(prompt, answer) tokens of real requests."""
    with (DATA / "azure_conv_lengths.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [(int(row["input_tokens"]), int(row["output_tokens"])) for row in rows]


def mean_lengths() -> Mixture:
    known = lengths()
    return Mixture(sum(p for p, _ in known) / len(known), sum(a for _, a in known) / len(known))


def sizes(chance: random.Random) -> Iterator[tuple[int, int]]:
    while True:
        yield chance.choice(lengths())


# ---- clusters


@dataclass(frozen=True)
class Cluster:
    """Kinds of machines by region. The client, who all requests come from, is in no region."""

    name: str
    machines: Mapping[str, Sequence[str]]
    wide: bool = False  # regions are far apart, and from the client
    spread_s: float = 0.010  # by how much delays between two regions differ
    crowded: bool = False  # no room for more KV caches than beside the most layers

    @property
    def nodes(self) -> list[tuple[str, str, str]]:
        """(name, kind, region) of each."""
        pairs = [(region, kind) for region, kinds in self.machines.items() for kind in kinds]
        return [(f"{kind}-{i}", kind, region) for i, (region, kind) in enumerate(pairs)]

    def path(self, a: str, b: str, chance: random.Random) -> LinkPath:
        """Between two regions, one way. Cross-region links differ by as much as Helix's do."""
        if not self.wide:
            return LinkPath(delay_s=0.001, bytes_per_s=1e9)
        if a == b:
            return LinkPath(delay_s=0.001, bytes_per_s=1.25e9 * chance.uniform(0.9, 1.1))
        delay_s = 0.050 + chance.uniform(-self.spread_s, self.spread_s)
        return LinkPath(delay_s=delay_s, bytes_per_s=12.5e6 + chance.uniform(-2.5e6, 2.5e6))


SINGLE = Cluster("single", {"a": ["A100"] * 4 + ["L4"] * 8 + ["T4"] * 12})
GEO = Cluster(
    "geo",
    {"a": ["A100"] * 4, "b": ["L4"] * 2 + ["T4"] * 8, "c": ["L4"] * 6 + ["T4"] * 4},
    wide=True,
)
MIXED = Cluster(
    "mixed",
    {
        "a": ["A100"] * 4
        + ["V100"] * 6
        + ["L4"] * 8
        + ["L4x2"] * 4
        + ["T4"] * 10
        + ["T4x2"] * 6
        + ["T4x4"] * 4
    },
)
TWO = Cluster("two", {"a": ["L4"] * 12, "b": ["L4"] * 12}, wide=True, spread_s=0.001, crowded=True)
CLUSTERS = {each.name: each for each in (SINGLE, GEO, MIXED, TWO)}
