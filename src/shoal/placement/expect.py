"""How long a session is expected to take at a stage and on the way between two.

All times of a session are in one unit, the seconds of its whole answer: what is paid once (the way
to the head, the prompt, waiting for a place) and what each token pays (steps, hops) can be added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..units import NodeId, Slice
from .model import Held

if TYPE_CHECKING:
    from .ring import Floats

Latency = Callable[[NodeId, NodeId], float]  # one way, seconds
Bandwidth = Callable[[NodeId, NodeId], float]  # bytes a second

LONGEST_S = 1e5  # a stage that says it takes longer takes this long: sums stay exact
MAX_TABLES = 8  # of distances, for different sets of nodes
MAX_PAIRS = 1 << 18  # whose distance is remembered
FULL_BATCH = 32  # sessions whose tokens share a step on a stage that has all it can take
CROWDED_S = 1e9  # more than all times of a route together: a stage without room is a last resort


@dataclass(frozen=True, slots=True)
class Work:
    """What a session asks of every layer. `others` says how much the time counts by which the
    sessions that run already are slowed: 0 = not at all, 1 = like our own.
    """

    prompt: int = 0  # tokens
    tokens: int = 1  # of the answer, expected
    others: float = 0.0

    @property
    def context(self) -> int:
        """What a token of the answer attends to, on average."""
        return self.prompt + self.tokens // 2


class Network:
    """How far nodes are from each other, asked once for each pair: make a new one when that may
    have changed. Without `bandwidth` messages take no time to write; `token_bytes` is the size of
    one token's hidden states.
    """

    def __init__(
        self, latency: Latency, bandwidth: Bandwidth | None = None, token_bytes: int = 0
    ) -> None:
        self._latency, self._bandwidth, self._token_bytes = latency, bandwidth, token_bytes
        self._known: dict[tuple[NodeId, NodeId], tuple[float, float]] = {}
        self._tables: dict[tuple[NodeId, ...], tuple[Floats, Floats]] = {}

    def pair(self, a: NodeId, b: NodeId) -> tuple[float, float]:
        """Seconds for any message one way, and seconds more for each token's hidden states."""
        known = self._known.get((a, b))
        if known is None:
            if len(self._known) >= MAX_PAIRS:
                self._known.clear()
            known = self._known[a, b] = self._asked(a, b)
        return known

    def _asked(self, a: NodeId, b: NodeId) -> tuple[float, float]:
        if a == b:
            return 0.0, 0.0
        seconds = min(self._latency(a, b), LONGEST_S)
        if self._bandwidth is None:
            return seconds, 0.0
        rate = max(self._bandwidth(a, b), 1.0)
        return seconds, min(self._token_bytes / rate, LONGEST_S)

    def hop(self, a: NodeId, b: NodeId, work: Work) -> float:
        """All that a session sends from `a` to `b`, each token after the one before it."""
        once, each = self.pair(a, b)
        return work.tokens * once + (work.prompt + work.tokens) * each

    def back(self, tail: NodeId, head: NodeId, work: Work) -> float:
        """Token ids, from the last stage to the first: too small to take time to write."""
        return work.tokens * self.pair(tail, head)[0]

    def tables(self, nodes: tuple[NodeId, ...]) -> tuple[Floats, Floats]:
        """`pair` of all these nodes [N, N], from and to."""
        import numpy as np

        if nodes not in self._tables:
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            pairs = np.array([[self.pair(a, b) for b in nodes] for a in nodes]).reshape(
                len(nodes), len(nodes), 2
            )
            self._tables[nodes] = pairs[:, :, 0], pairs[:, :, 1]
        return self._tables[nodes]


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of a session at one stage: `fixed` + `layer` for each layer it runs there, and
    `sample` when it is the last one.
    """

    fixed: float
    layer: float
    sample: float

    def seconds(self, layers: Slice) -> float:
        return self.fixed + self.layer * len(layers)


def stage_cost(stage: Held, work: Work) -> StageCost:
    """With the sessions that run there already, which share the steps, and those that wait."""
    ours = work.tokens
    step, layer, sample = _step(stage, work, stage.sessions + 1)
    if work.others and stage.sessions:
        less = _step(stage, work, stage.sessions)
        slowed = work.others * stage.sessions
        layer, sample = layer + slowed * (layer - less[1]), sample + slowed * (sample - less[2])
    once, each = _prompt(stage, work)
    return StageCost(
        min(ours * step + once + waiting_s(stage, work), LONGEST_S),
        min(ours * layer + each, LONGEST_S),
        min(ours * sample, LONGEST_S),
    )


def _prompt(stage: Held, work: Work) -> tuple[float, float]:
    """Reading the prompt: once, and for each layer."""
    if not work.prompt:
        return 0.0, 0.0
    read = stage.speed.seconds(1, work.prompt, work.prompt * work.prompt // 2)
    return stage.speed.step_s, min(read - stage.speed.step_s, LONGEST_S)


def _step(stage: Held, work: Work, sessions: int) -> tuple[float, float, float]:
    """Of a step with a token of so many sessions: once, for each layer, for choosing tokens."""
    speed = stage.speed
    layer = speed.seconds(1, sessions, sessions * work.context) - speed.step_s
    sample = sessions * speed.sample_s
    return min(speed.step_s, LONGEST_S), min(layer, LONGEST_S), min(sample, LONGEST_S)


def waiting_s(stage: Held, work: Work) -> float:
    """Who waits before us takes the place of one that ends: so many answers are waited for."""
    if not stage.queue:
        return 0.0
    step, layer, sample = _step(stage, work, stage.sessions + 1)
    answer = work.tokens * (step + layer * len(stage.layers) + sample)
    return stage.queue * answer / max(stage.sessions, 1)


def prefill_s(stage: Held, layers: Slice, known: int, prompt: int) -> float:
    """What a stage is spared that has the pages of the first `known` tokens of a prompt."""
    speed, count = stage.speed, len(layers)
    whole = speed.seconds(count, prompt, prompt * prompt // 2)
    rest = prompt - known
    left = speed.seconds(count, rest, rest * (known + prompt) // 2)
    return min(whole, LONGEST_S) - min(left, LONGEST_S)


def token_s(stage: Held, work: Work, batch: int = FULL_BATCH) -> StageCost:
    """What a token of the answer takes of the stage's time when `batch` sessions share its steps,
    the token's share of the prompt included: the other way round, what the stage can do.
    """
    step, layer, sample = _step(stage, work, batch)
    ratio = work.prompt / max(work.tokens, 1)
    prompt = ratio * (stage.speed.token_s + stage.speed.context_s * work.prompt / 2)
    return StageCost(step / batch, min(layer / batch + prompt, LONGEST_S), sample / batch)
