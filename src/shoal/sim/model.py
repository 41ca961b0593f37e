"""A model as the simulator knows it: how large its parts are, and text that can be checked.

Its text is a chain: each token follows from all tokens before it. Whoever knows the prompt knows
the whole answer (`expected`), and a stage that computes one row too few, twice, or over the pages
of somebody else gives another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

from ..placement import ModelShape
from ..units import ModelId, Slice

WORD = (1 << 64) - 1
ROOT = 0x9E3779B97F4A7C15  # what the first token follows


def mix(before: int, token: int) -> int:
    """The chain up to a token from the chain before it: 64 bits, a bijection of `before`."""
    mixed = ((before ^ (token + 1)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & WORD
    return mixed ^ (mixed >> 29)


@dataclass(frozen=True)
class SimModel:
    """`activation_bytes` are those of one token between two stages, all of them on the wire."""

    name: str
    layer_bytes: tuple[int, ...]
    kv_bytes: int  # of one token in one layer
    activation_bytes: int
    embed_bytes: int = 0
    head_bytes: int = 0
    vocab_size: int = 32000
    context_length: int = 32768
    dtype: str = "int8"

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def whole(self) -> Slice:
        return Slice(0, self.layers)

    @cached_property
    def model_id(self) -> ModelId:
        return ModelId(blake2b(self.name.encode(), digest_size=8).hexdigest())

    @cached_property
    def shape(self) -> ModelShape:
        return ModelShape(self.layer_bytes, self.embed_bytes, self.head_bytes, False, self.kv_bytes)

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """What hides the chain between two layers: layers that are left out give nonsense."""
        return tuple(mix(ROOT, layer) for layer in range(self.layers + 1))

    def token(self, chain: int) -> int:
        """What follows a text with this chain."""
        return (chain >> 7) % self.vocab_size

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        """The first `count` tokens of the answer."""
        chain = ROOT
        for token in prompt:
            chain = mix(chain, token)
        answer: list[int] = []
        for _ in range(count):
            answer.append(self.token(chain))
            chain = mix(chain, answer[-1])
        return answer
