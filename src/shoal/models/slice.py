"""Loads layers [start, stop) of a checkpoint as an `nn.Module`, reading only their bytes.

T tokens of this step, all requests together · R rows whose logits are wanted · E hidden width · V
vocabulary
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidRequest, UnsupportedModel
from ..units import Slice
from .attention import Ragged
from .checkpoint import Checkpoint
from .skeleton import LIBRARY_ERRORS, build, quiet

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
HEAD = "lm_head.weight"
ROTARY = r"rotary_emb\.inv_freq$"  # in old checkpoints; always computed anew


class ModelSlice(nn.Module):
    """A contiguous range of layers, run by the model's own modules and its own forward.

    `compute` is f32, bf16, f16 or int8; `dtype` is that of the hidden states that go in and out.
    """

    def __init__(
        self, model: Any, layers: Slice, total_layers: int, *, dtype: str, compute: str
    ) -> None:
        super().__init__()
        self.model = model
        self.layers, self.dtype_name, self.compute = layers, dtype, compute
        self.first, self.last = layers.start == 0, layers.stop == total_layers
        self.hidden_size = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def device(self) -> torch.device:
        first: Tensor = next(self.model.parameters())
        return first.device

    def forward(
        self, x: Tensor, positions: Tensor, cache: Any, ragged: Ragged, rows: Tensor | None = None
    ) -> Tensor:
        """`x`: token ids (T,) on the first stage, else hidden states (T, E).

        Returns logits (R, V) of `rows` on a last stage that is given some, else hidden states (T,
        E).
        """
        inputs: dict[str, Any] = {"input_ids" if self.first else "inputs_embeds": x[None]}
        inputs.update(
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            attention_mask=None,
            ragged=ragged,
        )
        if (
            self.last and rows is not None
        ):  # through the outer forward, which knows logit caps and scales
            logits: Tensor = self.model(**inputs, logits_to_keep=rows).logits[0]
            return logits
        hidden: Tensor = self.model.base_model(**inputs).last_hidden_state[0]
        return hidden


def load_slice(
    checkpoint: Checkpoint,
    layers: Slice,
    dtype: str | None = None,
    quant: Literal["none", "int8"] = "none",
    device: str = "cpu",
) -> ModelSlice:
    """Build and load. `dtype` None is the checkpoint's own.

    Raises UnsupportedModel when the architecture or the files do not fit, ModelNotFound when files
    cannot be had.
    """
    if layers.stop > checkpoint.layers:
        raise InvalidRequest(f"{checkpoint.name} has {checkpoint.layers} layers, not {layers.stop}")
    name = dtype or checkpoint.dtype
    if name not in DTYPES:
        raise InvalidRequest(
            f"{name!r} is no type to compute in", hint=f"choose one of {', '.join(DTYPES)}"
        )
    checkpoint.ensure_files(layers)
    with quiet():
        model = build(checkpoint.config, layers, DTYPES[name])
        _load(model, checkpoint, layers, DTYPES[name])
    model.to(device).requires_grad_(False)
    if quant == "int8":
        from .quant import quantise_linears

        quantise_linears(model)
    return ModelSlice(
        model, layers, checkpoint.layers, dtype=name, compute="int8" if quant == "int8" else name
    ).eval()


def _load(model: Any, checkpoint: Checkpoint, layers: Slice, dtype: torch.dtype) -> None:
    """Through transformers' own conversion, which renames old keys and fuses per-expert tensors."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    own = checkpoint.own(layers)
    how = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
        device_map={"": "cpu"},
    )
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(checkpoint.folder / file, "pt"))
            for file in {info.file for info in own.values()}
        }
        lazy = {name: files[info.file].get_slice(name) for name, info in own.items()}
        try:
            found, _ = convert_and_load_state_dict_in_model(model, lazy, how)
        except LIBRARY_ERRORS as error:
            raise UnsupportedModel(
                f"the weights of {checkpoint.name} cannot be read: {error}"
            ) from error
    tied = layers.stop == checkpoint.layers and checkpoint.tied
    if tied:
        model.tie_weights()
    _check_loaded(model, checkpoint, found, tied=tied)


def _check_loaded(model: Any, checkpoint: Checkpoint, found: Any, *, tied: bool) -> None:
    """Nothing may be missing, left over or of another shape: to run is not yet to be right."""
    state = model.state_dict()
    missing = {name for name in found.missing_keys if name in state} - ({HEAD} if tied else set())
    hollow = [
        name
        for part in (model.named_parameters(), model.named_buffers())
        for name, x in part
        if x.is_meta
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
