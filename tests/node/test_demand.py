"""What our clients ask for, as others hear it."""

from __future__ import annotations

import pytest

from shoal.bus.announcement import MAX_HINTS
from shoal.events import RequestDone, StepDone
from shoal.node.demand import MEMORY_S, USUAL_TOKENS, DemandMeter
from shoal.units import ModelId, SessionId


class Meter:
    def __init__(self) -> None:
        self.now = 1000.0
        self.meter = DemandMeter(self._id_of, lambda: self.now)

    @staticmethod
    def _id_of(name: str) -> ModelId | None:
        return ModelId(f"id-{name}") if name != "unknown" else None

    def done(self, name: str, reason: str, tokens: int) -> None:
        self.meter.listen(RequestDone(SessionId("s"), name, reason, tokens, 1.0))

    def rates(self) -> dict[str, float]:
        return {each.model: each.tokens_per_s for each in self.meter.announced()}


def test_a_steady_stream_of_answers_is_its_tokens_a_second() -> None:
    meter = Meter()
    for _ in range(3000):
        meter.now += 1.0
        meter.done("m", "length", 20)
    assert meter.rates()["id-m"] == pytest.approx(20, rel=0.02)


def test_what_nobody_asks_for_any_more_fades_and_is_not_spoken_of() -> None:
    meter = Meter()
    meter.done("m", "stop", 300)
    first = meter.rates()["id-m"]
    meter.now += MEMORY_S
    assert meter.rates()["id-m"] == pytest.approx(first / 2.718, rel=0.02)
    meter.now += 10 * MEMORY_S
    assert meter.rates() == {}


def test_a_request_that_was_refused_would_have_been_as_long_as_others() -> None:
    meter = Meter()
    meter.done("m", "no_route", 0)
    assert meter.rates()["id-m"] == pytest.approx(USUAL_TOKENS / MEMORY_S, rel=0.02)
    other = Meter()
    for _ in range(100):
        other.done("m", "stop", 10)
    other.now += 20 * MEMORY_S
    other.done("m", "overloaded", 0)
    assert other.rates()["id-m"] == pytest.approx(10 / MEMORY_S, rel=0.05)


def test_a_client_that_went_away_wanted_what_it_got() -> None:
    meter = Meter()
    meter.done("m", "cancelled", 0)
    assert meter.rates() == {}


def test_other_events_and_unknown_models_are_no_demand() -> None:
    meter = Meter()
    meter.meter.listen(StepDone(ModelId("id-m"), 1, 1, 0.1))
    meter.done("unknown", "no_route", 0)
    assert meter.rates() == {}


def test_of_many_models_the_most_wanted_are_announced_in_order() -> None:
    meter = Meter()
    for number in range(40):
        meter.done(f"m{number:02}", "stop", 100 + number)
    assert list(meter.rates()) == [f"id-m{number:02}" for number in range(40 - MAX_HINTS, 40)]
