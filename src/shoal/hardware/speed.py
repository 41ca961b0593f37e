"""How long a stage takes for a step: the one formula behind placement, routing and admission."""

from __future__ import annotations

import math

import msgspec


class Speed(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Seconds that the parts of a step take on one node, for one model in one compute class.

    A step reads the weights of its layers once, computes for each token, and reads what each token
    attends to. Of a mixture of experts it reads those that any of its tokens is sent to.
    """

    step_s: float = 0.0  # each step, whatever is in it
    layer_s: float = 0.0  # each layer: its weights, but for experts
    token_s: float = 0.0  # each token and layer
    context_s: float = 0.0  # each token that is attended to, and layer
    sample_s: float = 0.0  # each token that is chosen: the head
    experts_s: float = 0.0  # each layer, if all of its experts were read
    routed: float = 0.0  # the share of the experts that one token is sent to

    def __post_init__(self) -> None:
        times = (self.step_s, self.layer_s, self.token_s, self.context_s)
        for number in (*times, self.sample_s, self.experts_s, self.routed):
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{number} is not a time")
        if self.routed > 1:
            raise ValueError("a token is sent to a share of the experts")

    def seconds(self, layers: int, tokens: int = 1, context: int = 0, sampled: int = 0) -> float:
        """A step of `tokens` tokens that attend to `context` tokens, all together."""
        read = self.layer_s + self.experts_s * (1 - (1 - self.routed) ** tokens)
        each = read + tokens * self.token_s + context * self.context_s
        return self.step_s + layers * each + sampled * self.sample_s
