"""Which layouts a checkpoint's `quantization_config` announces. It came from anywhere."""

from __future__ import annotations

from typing import Any

import msgspec

from ...errors import UnsupportedModel
from . import awq, compressed, fp8, gptq, mxfp4
from .layout import Layout

METHODS = {
    "fp8": fp8.layouts,
    "fbgemm_fp8": fp8.layouts,
    "mxfp4": mxfp4.layouts,
    "compressed-tensors": compressed.layouts,
    "gptq": gptq.layouts,
    "awq": awq.layouts,
}
KEYS = ("quantization_config", "compression_config")  # the second is an older name
HINT = (
    "take the unquantised checkpoint, with --quant int8 to make it small here, or one quantised by "
    + ", ".join(METHODS)
)


def layouts_of(name: str, config: dict[str, Any]) -> tuple[Layout, ...]:
    """Empty for a checkpoint in floats. `config` is the `config.json` of the model `name`.

    Raises UnsupportedModel for methods that are not read, and for settings of known ones that are
    not, naming them.
    """
    stored = _quantization(config)
    if not stored:
        return ()
    method = described(config)
    reader = METHODS.get(method)
    if reader is None:
        raise UnsupportedModel(
            f"{name} is stored quantised ({method}), which is not read",
            hint=HINT,
        )
    try:
        return reader(stored)
    except msgspec.ValidationError as why:
        raise UnsupportedModel(
            f"{name} is stored quantised ({method}) in a way that is not read: {why}", hint=HINT
        ) from None


def described(config: dict[str, Any]) -> str:
    """The method's own name, "" when nothing is quantised."""
    stored = _quantization(config)
    return str(stored.get("quant_method", "unknown"))[:64] if stored else ""


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """`config.json` without what only says how the weights are stored."""
    return {key: value for key, value in config.items() if key not in KEYS}


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    for key in KEYS:
        stored = config.get(key)
        if stored is not None and not isinstance(stored, dict):
            raise UnsupportedModel(f"{key} is no object", hint=HINT)
        if stored:
            return stored
    return {}
