"""Fills a model's weights from a checkpoint, one layer after the other.

Whoever replaces weights by smaller ones does it in `ready`, so that never more than one layer lies
in memory in floats.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModel
from ..units import Slice
from .checkpoint import Checkpoint, layer_of
from .published.view import PlainTensors
from .skeleton import LIBRARY_ERRORS

HEAD = "lm_head.weight"
ROTARY = r"rotary_emb\.inv_freq$"  # in old checkpoints; always computed anew

# Gets a layer with its index; before all layers the model itself with None, when embedding, norm
# and head are there and the layers still lie on `meta`.
Ready = Callable[[nn.Module, int | None], None]


def load_weights(
    model: Any,
    checkpoint: Checkpoint,
    layers: Slice,
    dtype: torch.dtype,
    device: str,
    *,
    ready: Ready,
) -> None:
    """Raises UnsupportedModel when tensors are missing, left over or of another shape."""
    parts: dict[int | None, list[str]] = {None: [], **{index: [] for index in layers}}
    plain = checkpoint.plain(layers)
    for name in plain:
        parts[layer_of(name)].append(name)
    tied = layers.stop == checkpoint.layers and checkpoint.tied
    tensors = PlainTensors(checkpoint.folder, plain)
    for index, names in parts.items():
        found = _convert(model, checkpoint, {n: tensors.lazy(n) for n in names}, dtype)
        if index is None and tied:
            model.tie_weights()
        _check(model, checkpoint, found, index, tied=tied)
        part = model if index is None else model.base_model.layers[index]
        _settle(part, device)
        ready(part, index)
        _trim()


def _convert(model: Any, checkpoint: Checkpoint, lazy: dict[str, Any], dtype: torch.dtype) -> Any:
    """Through transformers' own conversion, which renames old keys and fuses per-expert tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    how = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
        device_map={"": "cpu"},
    )
    try:
        return convert_and_load_state_dict_in_model(model, lazy, how)[0]
    except LIBRARY_ERRORS as error:
        raise UnsupportedModel(
            f"the weights of {checkpoint.name} cannot be read: {error}"
        ) from error


def _settle(part: Any, device: str) -> None:
    """Onto its device, for inference only. Layers that are not loaded yet stay on `meta`."""
    part._apply(lambda x: x if x.is_meta else x.to(device))
    part.requires_grad_(False)


def _trim() -> None:
    """Give freed memory back to the system. Else the allocator keeps every layer's floats, in heaps
    of the threads that read them.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other libraries lack it
        if trim is not None:
            trim(0)


def _check(
    model: Any, checkpoint: Checkpoint, found: Any, index: int | None, *, tied: bool
) -> None:
    """Nothing may be missing, left over or of another shape: to run is not yet to be right."""
    missing = {name for name in found.missing_keys if layer_of(name) == index}
    missing -= {HEAD} if tied else set()
    hollow = [
        name
        for part in (model.named_parameters(), model.named_buffers())
        for name, x in part
        if x.is_meta and layer_of(name) == index
    ]
    wrong = [
        *(f"no {name}" for name in sorted(missing)),
        *(
            f"a left-over {name}"
            for name in sorted(found.unexpected_keys)
            if not _idle(model, name)
        ),
        *(f"a wrong shape of {name[0]}" for name in sorted(found.mismatched_keys)),
        *(f"{name} cannot be converted" for name in sorted(found.conversion_errors)),
        *(f"no value for {name}" for name in hollow),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        why = ", ".join(wrong[:3]) + more
        raise UnsupportedModel(
            f"the tensors of {checkpoint.name} do not fit its architecture: {why}"
        )


def _idle(model: Any, name: str) -> bool:
    """Tensors that some checkpoints carry and no forward uses; each model names its own."""
    patterns = (ROTARY, *(model._keys_to_ignore_on_load_unexpected or ()))
    return any(re.search(pattern, name) for pattern in patterns)
