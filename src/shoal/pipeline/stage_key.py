"""What must agree between a gateway's plan and a stage."""

from __future__ import annotations

from dataclasses import dataclass

from ..units import ModelId, Slice

WHOLE = ("gguf", "served")  # computed by others' engines, which run all of a slice


@dataclass(frozen=True, slots=True)
class StageKey:
    model: ModelId
    compute: str
    layers: Slice

    def runs(self, part: StageKey) -> bool:
        """Whether a session can have this part of our layers here."""
        fits = (part.model, part.compute) == (self.model, self.compute)
        return fits and part.compute not in WHOLE and part.layers.within(self.layers)
