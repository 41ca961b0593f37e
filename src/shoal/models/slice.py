"""Loads layers [start, stop) of a checkpoint as an `nn.Module`, reading only their bytes.

T tokens of this step, all requests together · R rows whose logits are wanted · E hidden width · V
vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidRequest, UnsupportedModel
from ..exact.devices import computes_exactly
from ..units import EXACT, Quant, Slice
from .attention import Ragged
from .checkpoint import Checkpoint
from .dense import DenseParts, is_dense
from .loading import Ready, load_weights
from .mixers import read_by_rows
from .skeleton import build, keeps_states, part_of, quiet

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class ModelSlice(nn.Module):
    """A contiguous range of layers, run by the model's own modules and its own forward.

    `compute` is f32, bf16, f16, or how weights are kept; `dtype` is that of the hidden states in
    and out.
    """

    def __init__(
        self,
        model: Any,
        layers: Slice,
        total_layers: int,
        *,
        dtype: str,
        compute: str,
        device: str = "cpu",
        dense: DenseParts | None = None,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.device = torch.device(device)
        self.model = model
        self.layers, self.total_layers = layers, total_layers
        self.dtype_name, self.compute = dtype, compute
        self.first, self.last = layers.start == 0, layers.stop == total_layers
        self.hidden_size = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)

    def part(self, layers: Slice) -> ModelSlice:
        """Some of its layers as a slice of their own, with the same weights.

        Raises ValueError when it does not have them all.
        """
        if not layers.within(self.layers):
            raise ValueError(f"layers {layers} are not all among {self.layers}")
        return ModelSlice(
            self.model if self.dense is not None else part_of(self.model, layers),
            layers,
            self.total_layers,
            dtype=self.dtype_name,
            compute=self.compute,
            device=str(self.device),
            dense=self.dense,
        )

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def exact(self) -> bool:
        """Whether it computes in the exact class."""
        return self.compute in EXACT

    @property
    def asks_nothing(self) -> bool:
        """Whether a forward never waits for its device: experts are chosen, and the angles of some
        families computed, on the host.
        """
        mixes = any(hasattr(module, "experts") for module in self.modules())
        return not mixes and (self.dense is not None or not self.exact)

    @property
    def nbytes(self) -> int:
        """What its weights take in memory."""
        kept = sum(t.nbytes for t in (*self.parameters(), *self.buffers()))
        kept += sum(getattr(module, "kept_bytes", 0) for module in self.modules())
        return kept + (self.dense.nbytes if self.dense is not None else 0)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: Any,
        ragged: Ragged,
        rows: Tensor | None = None,
        highest: int | None = None,
    ) -> Tensor:
        """`x`: token ids (T,) on the first stage, else hidden states (T, E). `highest` is no lower
        than any position; without it, a device is asked.

        Returns logits (R, V) of `rows` on a last stage that is given some, else hidden states (T,
        E).
        """
        rows = rows if self.last else None
        if self.dense is not None:
            if highest is None:
                highest = int(positions.max())
            own = self.layers
            return self.dense.forward(x, own, positions, highest, ragged, rows, self.dtype)
        inputs: dict[str, Any] = {"input_ids" if self.first else "inputs_embeds": x[None]}
        inputs.update(
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            attention_mask=None,
            ragged=ragged,
        )
        if rows is not None:  # through the outer forward, which knows logit caps and scales
            logits: Tensor = self.model(**inputs, logits_to_keep=rows).logits[0]
            return logits
        hidden: Tensor = self.model.base_model(**inputs).last_hidden_state[0]
        return hidden


def load_slice(
    checkpoint: Checkpoint,
    layers: Slice,
    dtype: str | None = None,
    quant: Quant = "none",
    device: str = "cpu",
) -> ModelSlice:
    """Build and load, layer by layer. `dtype` None is the checkpoint's own.

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
    if quant in EXACT and not computes_exactly(device):
        raise UnsupportedModel(
            f"{device} does not give the bits that all others give: it cannot compute as {quant}",
            hint="--device cpu, or floats: --quant none",
        )
    checkpoint.ensure_files(layers)
    with quiet():
        model = build(checkpoint.architecture, layers, DTYPES[name])
        ready = _ready(model, layers, checkpoint, quant)
        load_weights(
            model,
            checkpoint,
            layers,
            DTYPES[name],
            device,
            ready=ready,
        )
    read_by_rows(model)
    return ModelSlice(
        model,
        layers,
        checkpoint.layers,
        dtype=name,
        compute=name if quant == "none" else quant,
        device=device,
        dense=ready if isinstance(ready, DenseParts) else None,
    ).eval()


def _ready(model: Any, layers: Slice, checkpoint: Checkpoint, quant: Quant) -> Ready:
    """What is done with each part of the model once its weights are there."""
    from .parts import ExactParts, FloatParts
    from .weight_only import WeightOnlyParts

    if quant == "none":
        return FloatParts()
    if quant in EXACT and keeps_states(model.config):
        raise UnsupportedModel(
            f"{checkpoint.name} keeps running sums from token to token, which are not made exact",
            hint="a float type works: --quant none",
        )
    if quant == "w8" or quant == "w4":
        return WeightOnlyParts(quant)
    if is_dense(model.config):
        return DenseParts(model, layers, checkpoint.context_length, quant)
    return ExactParts(quant)
