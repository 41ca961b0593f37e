"""The one hook by which a model's own forward reaches our attention: transformers calls us, we
call `ragged`.

No mask function is registered under our name, so the models build no masks: whoever attends masks
by itself.
"""

# ruff: noqa: N803 - the letters at the end of a tensor's name are its axes

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UnsupportedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..exact.layer import Angles, DenseLayer
    from ..units import Slice

NAME = "shoal"


class Ragged(Protocol):
    """Attention over a flat axis of tokens that belong to several requests.

    T new tokens · H heads · K kv heads · D head width
    """

    def attend(
        self,
        q_1HTD: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        """Returns (1, T, H, D). `k` and `v` are what the cache's `update` returned, or made from
        it.
        """
        ...

    def attend_latents(
        self, q_1HTD: Tensor, latents: Tensor, turned: Tensor, *, scaling: float
    ) -> Tensor:
        """Returns (1, T, H, R): sums of latents (1, 1, T, R), which with the rotated keys `turned`
        (1, 1, T, D - R) are what the layer cached; see `absorbed.py`.
        """
        ...

    def dense(
        self,
        layers: Mapping[int, DenseLayer],
        own: Slice,
        x: Tensor,
        angles: Angles,
        dtype: torch.dtype,
    ) -> Tensor:
        """x (T, E) float32, which is not kept, through those of `layers` that are in `own`; see
        `exact/layer.py`. `layers` are always the same: all that the stage has.
        """
        ...


def register() -> None:
    """Make our name known to transformers. Doing it twice is harmless."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ragged: Ragged | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    if ragged is None or attention_mask is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} does not hand its arguments down to the attention function"
        )
    if (absorbed := getattr(module, "absorbed", None)) is not None:
        return absorbed.attend(ragged, query, key, value, named["scaling"]), None
    return ragged.attend(
        query,
        key,
        value,
        scaling=named.get("scaling"),
        window=_told_or_held("sliding_window", "sliding_window", named, module) or None,
        sinks=_told_or_held("s_aux", "sinks", named, module),
        softcap=named.get("softcap"),
    ), None


def _told_or_held(argument: str, attribute: str, named: dict[str, Any], module: nn.Module) -> Any:
    """An argument counts even when it is None; models that pass none may hold it in the module."""
    return named[argument] if argument in named else getattr(module, attribute, None)
