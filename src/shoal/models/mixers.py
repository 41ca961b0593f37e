"""Layers that read a text token by token into a running state instead of looking back at all of it:
gated delta nets, Mamba, short convolutions.

Their own code takes texts of one length. So each is asked row by row, with the row's state in hand;
whoever keeps the states is its cache.

T new tokens, all rows together · B rows of one length · N tokens of each · E hidden width
"""

# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import UnsupportedModel

CACHES = ("cache_params", "past_key_values")  # how transformers calls the argument

Mixer = Callable[[Tensor, Any], Tensor]
"""(B, N, E) and their states, as transformers' caches have them -> (B, N, E)."""


class States(Protocol):
    def mix(self, layer: int, mixer: Mixer, x_1TE: Tensor) -> Tensor:
        """Call the mixer of this layer for each row; returns (1, T, E)."""
        ...


class RowByRow(nn.Module):
    """A mixer whose tokens belong to several rows."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, *_: Any, **named: Any) -> Tensor:
        name = next((name for name in CACHES if named.get(name) is not None), None)
        if name is None:
            raise UnsupportedModel(f"{type(self.mixer).__name__} is not handed the cache by name")
        states: States = named[name]

        def each(x_BNE: Tensor, held: Any) -> Tensor:
            out: Tensor = self.mixer(x_BNE, **{name: held})
            return out

        return states.mix(self.mixer.layer_idx, each, hidden_states)


def read_by_rows(part: nn.Module) -> None:
    """Wrap the mixers below `part` in place."""
    for parent in list(part.modules()):
        for name, child in list(parent.named_children()):
            if is_mixer(child) and not isinstance(parent, RowByRow):
                setattr(parent, name, RowByRow(child))


def is_mixer(module: nn.Module) -> bool:
    """They all begin with a short convolution along the text."""
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return convolves and hasattr(module, "layer_idx")
