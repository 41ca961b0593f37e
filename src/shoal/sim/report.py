"""What a run amounts to: throughput, waiting times, how requests ended, what was moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from .asked import Asked
from .scenario import Scenario
from .world import World

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment of the whole mesh: `tokens_per_s` since the moment before."""

    at_s: float
    nodes: int
    tokens_per_s: float
    running: int  # requests


class Percentiles(msgspec.Struct, frozen=True):
    """Seconds; 0.0 where nothing was measured."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        ordered = sorted(values)
        if not ordered:
            return cls()
        last = len(ordered) - 1
        p50, p95, p99 = (ordered[round(share * last)] for share in (0.5, 0.95, 0.99))
        return cls(p50, p95, p99, len(ordered))


class Report(msgspec.Struct, kw_only=True):
    """Figures of the time after the warm-up; endings of all requests."""

    name: str
    seed: int
    measured_s: float
    output_tokens_per_s: float  # as they came to clients
    prompt_tokens_per_s: float  # of requests whose first token came
    first_token: Percentiles
    between_tokens: Percentiles
    endings: dict[str, int] = {}  # whole, refused, lost, gateway lost, given up, running
    wrong_texts: int = 0  # must be 0: tokens missing, doubled or misplaced
    nodes: int = 0  # at the end
    routes: int = 0  # that sessions took: more than requests where some broke
    moves: int = 0  # slices that were put into service, the first of each node left out
    loaded_bytes: int = 0  # weights
    link_bytes: int = 0  # between nodes
    relay_posted: dict[str, int] = {}
    relay_delivered: dict[str, int] = {}
    samples: tuple[Sample, ...] = ()
    digest: str = ""  # of all events: the same for the same seed

    def count_endings(self, asked: Sequence[Asked]) -> None:
        """Once what was under way has ended."""
        self.endings = dict(sorted(Counter(each.outcome for each in asked).items()))
        self.wrong_texts = sum(not each.is_right for each in asked if each.is_text)


def measure(world: World, scenario: Scenario, samples: Sequence[Sample]) -> Report:
    """As of now."""
    begin_s, now = scenario.warm_up_s, world.now
    came = [asked for asked in world.asked if asked.came_s and asked.came_s[-1] >= begin_s]
    measured_s = max(1e-9, now - begin_s)
    first = [asked for asked in came if asked.came_s[0] >= begin_s]
    gaps = (
        b - a
        for asked in came
        for a, b in zip(asked.came_s, asked.came_s[1:], strict=False)
        if b >= begin_s
    )
    output = sum(at_s >= begin_s for asked in came for at_s in asked.came_s)
    posted: Counter[str] = sum((relay.posted for relay in world.relays), Counter())
    delivered: Counter[str] = sum((relay.delivered for relay in world.relays), Counter())
    return Report(
        name=scenario.name,
        seed=world.seed,
        measured_s=measured_s,
        output_tokens_per_s=output / measured_s,
        prompt_tokens_per_s=sum(len(asked.prompt) for asked in first) / measured_s,
        first_token=Percentiles.of(asked.came_s[0] - asked.at_s for asked in first),
        between_tokens=Percentiles.of(gaps),
        nodes=len(world.nodes),
        routes=world.counts["route"],
        moves=world.counts["serving"] - world.counts["first serving"],
        loaded_bytes=world.loaded_bytes(),
        link_bytes=world.network.sent.total(),
        relay_posted=dict(posted),
        relay_delivered=dict(delivered),
        samples=tuple(samples),
        digest=world.digest(),
    )


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The values as blocks of text, from 0 to the largest."""
    if not values:
        return ""
    width = min(width, len(values))
    parts = [
        values[at * len(values) // width : max(1, (at + 1) * len(values) // width)]
        for at in range(width)
    ]
    means = [sum(part) / max(1, len(part)) for part in parts]
    highest = max(means) or 1.0
    return "".join(BLOCKS[round(mean / highest * (len(BLOCKS) - 1))] for mean in means)
