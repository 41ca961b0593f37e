"""How long steps take, learnt from those that were done: the online half of the cost model. Pure.

What the machine is expected to do comes in as a `Speed` (`placement/cost.py` predicts one); what it
was seen to do corrects it. Steps of like size share a bucket that keeps their recent mean, so that
an hour of single tokens does not wash out what the last long prompt has taught. The formula's
coefficients are those that fit the buckets best, each counted by its relative error, none negative
and none further from the expected one than the buckets ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import NamedTuple

from ..hardware import Speed
from ..units import Slice
from .rows import Row

NEWEST = 0.2  # weight of the newest step in its bucket, and in what follows the last steps
BURST = 4.0  # a step that took so many times its bucket's mean was disturbed: it counts as this
TRUST = 0.05  # in what was expected, against one bucket
SWEEPS = 40  # of the fit, at most
CLOSE = 1e-4  # a sweep that changes no coefficient by more is the last
FADES = 256  # steps after which a bucket that none of them belonged to counts half
REFIT = 64  # steps between two fits, fewer at first


class Work(NamedTuple):
    """What was in a step."""

    tokens: int
    context: int  # pairs of a token and one that it attends to
    sampled: int  # tokens that were chosen

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Work:
        tokens = sum(row.count for row in rows)
        context = sum(row.count * row.start + row.count * (row.count + 1) // 2 for row in rows)
        sampled = sum(1 + len(row.draft) for row in rows if row.sampler is not None)
        return cls(tokens, context, sampled)

    @property
    def size(self) -> tuple[int, int, bool]:
        """Steps of one size share a bucket: tokens up to a factor of 2, context of 4."""
        each = self.context // max(self.tokens, 1)
        return self.tokens.bit_length(), each.bit_length() // 2, self.sampled > 0


@dataclass(slots=True)
class _Bucket:
    """Recent means."""

    features: list[float]
    seconds: float
    step: int  # its newest

    def add(self, features: Sequence[float], seconds: float) -> None:
        capped = min(seconds, BURST * self.seconds)
        self.seconds += NEWEST * (capped - self.seconds)
        for i, value in enumerate(features):
            self.features[i] += NEWEST * (value - self.features[i])


@dataclass
class SpeedMeter:
    """Learns the `Speed` of one stage of `layers` layers, starting from what is `expected`."""

    layers: int
    expected: Speed = field(default_factory=Speed)
    _buckets: dict[tuple[int, int, bool], _Bucket] = field(default_factory=dict)
    _fitted: Speed | None = None
    _steps: int = 0
    _fresh: int = 0  # steps since the last fit

    def observe(self, work: Work, seconds: float) -> None:
        """A step with this work took so long."""
        self.observe_parts([(self.layers, work)], seconds)

    def observe_parts(self, parts: Sequence[tuple[int, Work]], seconds: float) -> None:
        """A step of several forwards: so many layers, with this work, each."""
        seconds = max(seconds, 1e-9)
        features = [sum(each) for each in zip(*(self._features(*p) for p in parts), strict=True)]
        features[0] += self._own_share
        size = max(work.size for _, work in parts)
        bucket = self._buckets.get(size)
        if bucket is None:
            self._buckets[size] = _Bucket(features, seconds, self._steps)
        else:
            bucket.add(features, seconds)
            bucket.step = self._steps
        self._steps += 1
        self._fresh += 1

    @property
    def speed(self) -> Speed:
        """Fitted when it is asked for, to all steps but the last tenth or so."""
        if self._fitted is None or self._fresh >= min(REFIT, 1 + self._steps // 8):
            self._fitted = self._fit() if self._buckets else self.expected
            self._fresh = 0
        return self._fitted

    # ---- the fit: seconds = features * coefficients

    def _features(self, layers: int, work: Work) -> list[float]:
        """All but the step's own cost, which several forwards share."""
        read = 1 - (1 - self.expected.routed) ** work.tokens
        fixed = (1 - self._own_share) * layers / self.layers
        return [fixed, layers * work.tokens, layers * work.context, work.sampled, layers * read]

    @property
    def _own_share(self) -> float:
        """How much of a step's fixed cost is the step's own and not its layers', as expected."""
        fixed = self._expected_coefficients()[0]
        return self.expected.step_s / fixed if fixed else 0.0

    def _fit(self) -> Speed:
        """Least squares by coordinate descent: five unknowns, some dozens of buckets."""
        buckets = list(self._buckets.values())
        rows = []
        for each in buckets:
            weight = 0.5 ** ((self._steps - each.step) / (2 * FADES))
            rows.append([weight, *(weight * value / each.seconds for value in each.features)])
        ones, *columns = map(list, zip(*rows, strict=True))
        aims = [_dot(column, ones) for column in columns]
        norms = [[_dot(a, b) for b in columns] for a in columns]
        return self._as_speed(_descend(norms, aims, self._expected_coefficients(), len(rows)))

    def _expected_coefficients(self) -> list[float]:
        known = self.expected
        fixed = known.step_s + self.layers * known.layer_s
        return [fixed, known.token_s, known.context_s, known.sample_s, known.experts_s]

    def _as_speed(self, found: Sequence[float]) -> Speed:
        """What no step can tell apart, the step's own cost and its layers', stays in the expected
        proportion.
        """
        fixed, token_s, context_s, sample_s, experts_s = found
        own = self._own_share
        return Speed(
            step_s=fixed * own,
            layer_s=fixed * (1 - own) / self.layers,
            token_s=token_s,
            context_s=context_s,
            sample_s=sample_s,
            experts_s=experts_s,
            routed=self.expected.routed,
        )


@dataclass
class Pace:
    """How many prompt tokens may join those who generate: a step with them takes up to `times` one
    without. `most` until that is known, `least` however slow they are.

    It follows the last steps, where the meter remembers long ones; the meter says what to expect
    before the first prompt.
    """

    meter: SpeedMeter
    times: float
    most: int
    least: int
    _step_s: float | None = None  # of a step without prompts
    _token_s: float | None = None  # more for each prompt token

    def observe(self, rows: Sequence[Row], seconds: float) -> None:
        self.meter.observe_parts(self._works(rows), seconds)
        prompt_tokens = sum(row.count for row in rows if not row.generates)
        if not prompt_tokens:
            self._step_s = _mean(self._step_s, seconds)
        else:
            more_s = max(0.0, seconds - (self._step_s or 0.0))
            self._token_s = _mean(self._token_s, more_s / prompt_tokens)

    def _works(self, rows: Sequence[Row]) -> list[tuple[int, Work]]:
        """Of each part of the layers that rows run; mostly of all of them."""
        parts: dict[Slice | None, list[Row]] = {}
        for row in rows:
            parts.setdefault(row.layers, []).append(row)
        whole = self.meter.layers
        return [
            (whole if part is None else len(part), Work.of(some)) for part, some in parts.items()
        ]

    def budget(self) -> int:
        """Prompt tokens of one step while sessions generate."""
        token_s = self._token_s
        if token_s is None:
            token_s = self.meter.layers * self.meter.speed.token_s
        if self._step_s is None or not token_s:
            return self.most
        tokens = int((self.times - 1.0) * self._step_s / token_s)
        return min(self.most, max(self.least, tokens))


def _descend(
    norms: Sequence[Sequence[float]], aims: Sequence[float], expected: Sequence[float], count: int
) -> list[float]:
    """The x that makes |Ax - b|^2 least, with `norms` = A'A, `aims` = A'b, none below 0, each drawn
    towards what is `expected` of it. A has `count` rows.
    """
    found = list(expected)
    for _ in range(SWEEPS):
        most = 0.0
        for j, norm in enumerate(norms):
            if not norm[j]:
                continue
            trust = TRUST * norm[j] / count
            gain = aims[j] - _dot(norm, found) + norm[j] * found[j]
            best = max(0.0, (gain + trust * expected[j]) / (norm[j] + trust))
            most = max(most, abs(best - found[j]) / (best + found[j] or 1.0))
            found[j] = best
        if most < CLOSE:
            break
    return found


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    total: float = sum(map(mul, a, b))
    return total


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + NEWEST * (now - before)
