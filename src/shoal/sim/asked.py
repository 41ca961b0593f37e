"""A request as its client sees it: what was asked, what came and when, how it ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ShoalError
from .model import SimModel

Outcome = Literal["running", "whole", "refused", "lost", "gateway lost", "given up"]


@dataclass(eq=False)
class Asked:
    """Times are seconds of the virtual clock. An answer is lost when it broke off after tokens had
    come, and refused when none had.
    """

    model: SimModel
    prompt: tuple[int, ...]
    max_tokens: int
    gateway: str
    at_s: float
    tokens: list[int] = field(default_factory=list)
    came_s: list[float] = field(default_factory=list)  # when each token came
    error: ShoalError | None = None
    outcome: Outcome = "running"
    done_s: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def first_s(self) -> float | None:
        """From the request to its first token."""
        return self.came_s[0] - self.at_s if self.came_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [b - a for a, b in zip(self.came_s, self.came_s[1:], strict=False)]

    @property
    def is_text(self) -> bool:
        """False where stages did not compute, or nothing came."""
        return any(self.tokens)

    @property
    def is_right(self) -> bool:
        """As far as it came it is the text of the model, no token missing and none doubled."""
        return self.tokens == self.model.expected(self.prompt, len(self.tokens))

    def end(self, outcome: Outcome, now: float, error: ShoalError | None = None) -> None:
        if self.outcome == "running":
            self.outcome, self.error, self.done_s = outcome, error, now
            self.done.set()

    def fail(self, error: ShoalError, now: float) -> None:
        self.end("lost" if self.tokens else "refused", now, error)
