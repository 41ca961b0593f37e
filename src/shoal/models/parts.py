"""What becomes of each part of a model as it is loaded: see `loading.py`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from ..units import Quant
from .absorbed import absorb
from .experts import replace_experts
from .pieces import ExactRotary, replace_pieces
from .prepacked import prepack
from .quant import ExactLinear, quantise, quantise_linears


class FloatParts:
    """Leaves all as it is, except that attention over latents does not expand them, and that bf16
    weights on a CPU are packed for it.
    """

    def __call__(self, part: Any, index: int | None) -> None:
        if index is not None:
            absorb(part, exact=False)
            prepack(part)
        elif not getattr(part.config, "tie_word_embeddings", False):  # or kept twice
            ends = nn.ModuleDict({"head": part.lm_head})
            prepack(ends)
            part.lm_head = ends["head"]


class ExactParts:
    """Gives a model that runs through its own modules the arithmetic of the exact class, piece by
    piece. Raises UnsupportedModel for a layer in which something would stay inexact.
    """

    def __init__(self, kind: Quant) -> None:
        self._kind = kind

    def __call__(self, part: Any, index: int | None) -> None:
        if index is None:
            self._ends(part)
            return
        replace_experts(part, quantise(self._kind))
        absorb(part, exact=True)
        replace_pieces(part)
        quantise_linears(part, self._kind)
        _check(part)

    def _ends(self, model: Any) -> None:
        """8 bits for the head whatever the kind, as its own copy if tied."""
        if type(model.lm_head) is nn.Linear:
            model.lm_head = ExactLinear(model.lm_head, quantise("int8"))
        base = model.base_model
        base.rotary_emb = ExactRotary(base.rotary_emb)
        for name, child in list(base.named_children()):
            if name != "layers":
                replace_pieces(nn.ModuleDict({name: child}))


def _check(part: nn.Module) -> None:
    """A float matrix that is left would multiply inexactly."""
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise UnsupportedModel(
                    f"{type(module).__name__} multiplies with {name} in a way that cannot be made "
                    "exact",
                    hint="a float type works: --quant none",
                )
