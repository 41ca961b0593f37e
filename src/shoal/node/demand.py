"""How much our clients ask of each model: tokens/s, those of refused requests as well."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..bus.announcement import MAX_HINTS, Demand
from ..bus.limits import Bounded
from ..events import Event, RequestDone
from ..units import ModelId

MEMORY_S = 300.0  # what was asked for so long ago counts a third
USUAL_TOKENS = 256.0  # of an answer, before any was given
LEAST = 0.01  # tokens/s that are worth a word
MOST_MODELS = 64
_LEARNS = 0.1  # the weight of the newest answer's length
_REFUSED = ("no_route", "overloaded", "stage_lost", "no_capacity")


@dataclass(slots=True)
class _Asked:
    tokens: float = 0.0  # fading
    at: float = 0.0
    usual: float = USUAL_TOKENS  # length of an answer

    def faded(self, now: float) -> float:
        return self.tokens * math.exp(-(now - self.at) / MEMORY_S)


class DemandMeter:
    """Listens to the events of our own gateway. `id_of` knows the model of that name, if any."""

    def __init__(self, id_of: Callable[[str], ModelId | None], clock: Callable[[], float]) -> None:
        self._id_of, self._clock = id_of, clock
        self._models: Bounded[ModelId, _Asked] = Bounded(MOST_MODELS)

    def listen(self, event: Event) -> None:
        """A request that could not be served would have been as long as others are."""
        if not isinstance(event, RequestDone):
            return
        model = self._id_of(event.model_name)
        if model is None:
            return
        asked = self._models.get(model) or _Asked()
        tokens = float(event.generated_tokens)
        if event.reason in _REFUSED:
            tokens = max(tokens, asked.usual)
        elif event.reason != "cancelled":
            asked.usual += _LEARNS * (tokens - asked.usual)
        now = self._clock()
        asked.tokens, asked.at = asked.faded(now) + tokens, now
        self._models[model] = asked

    def announced(self) -> tuple[Demand, ...]:
        """The models that are asked for most, by id; rounded, so that it does not change always."""
        now = self._clock()
        rates = {model: asked.faded(now) / MEMORY_S for model, asked in self._models.items()}
        most = sorted(rates, key=lambda model: (-rates[model], model))[:MAX_HINTS]
        return tuple(
            Demand(model, float(f"{rates[model]:.2g}"))
            for model in sorted(most)
            if rates[model] >= LEAST
        )
