"""Makes a tiny configuration of the same architecture: every mechanism stays, every size goes.

Sizes are recognised by name. A window, chunk or top-k that stayed large would never come into play
in a short text, so whatever is left large and sounds like one becomes small, too.
"""

from __future__ import annotations

import copy
from typing import Any

LAYERS, MOST_LAYERS = 4, 12
HEADS = 4
HEAD_WIDTH = 16
SIZES = {
    "hidden_size": HEADS * HEAD_WIDTH,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "head_dim": HEAD_WIDTH,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": HEAD_WIDTH,
    "qk_nope_head_dim": HEAD_WIDTH,
    "qk_head_dim": 2 * HEAD_WIDTH,
    "v_head_dim": HEAD_WIDTH,
    "mamba_d_state": HEAD_WIDTH,
    "mamba_n_groups": 1,
    "linear_num_heads": HEADS,
    "linear_head_dim": HEAD_WIDTH,
    "linear_num_key_heads": HEADS // 2,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": HEAD_WIDTH,
    "linear_value_head_dim": HEAD_WIDTH,
    "vocab_size": 211,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRODUCT = {  # one is the product of the others, so none may stay smaller
    "mamba_n_heads": 2 * HEADS,
    "mamba_d_head": HEAD_WIDTH,
    "mamba_d_ssm": 2 * HEADS * HEAD_WIDTH,
}
REACHES = ("window", "chunk", "topk", "top_k", "block_size", "floor_scale", "local_attention")
REACH = 8
LARGE = 64
FREE = ("position", "theta", "token", "seed")  # large numbers that are no sizes
ROPE = ("rope_scaling", "rope_parameters")
QUANTIZATION = ("quantization_config", "compression_config")


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with 4 layers or a few more, so that every kind of layer is among them."""
    tiny = copy.deepcopy(config)
    layers = _layers(config)
    for key, value in config.items():
        tiny[key] = _shrunk(key, value, config, layers)
    tiny["num_hidden_layers"] = layers
    for key in ROPE:
        if isinstance(tiny.get(key), dict):
            tiny[key] = _rope(tiny[key], tiny)
    for key in ("dtype", "torch_dtype", "architectures", "auto_map", *QUANTIZATION):
        tiny.pop(key, None)
    return tiny


def _layers(config: dict[str, Any]) -> int:
    """Enough layers to meet each kind of every list that speaks of layers."""
    total = int(config["num_hidden_layers"])
    wanted = min(LAYERS, total)
    for value in config.values():
        if _by_layer(value, total) and all(isinstance(kind, str | int | bool) for kind in value):
            kinds = set(value)
            wanted = max(wanted, *(value.index(kind) + 1 for kind in kinds))
    return min(wanted, MOST_LAYERS)


def _by_layer(value: object, total: int) -> bool:
    return isinstance(value, list) and len(value) == total and total > 1


def _shrunk(key: str, value: Any, config: dict[str, Any], layers: int) -> Any:
    if _by_layer(value, int(config["num_hidden_layers"])):
        return value[:layers]
    if key in ("num_attention_heads", "num_key_value_heads"):
        return _heads(key, config)
    if isinstance(value, list) and key == "eos_token_id":
        return SIZES[key]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key in PRODUCT:
        return PRODUCT[key]
    if key in SIZES:
        return min(value, SIZES[key]) if value > 0 else value
    if any(part in key for part in REACHES):
        return min(value, REACH)
    if value > LARGE and not any(part in key for part in FREE):
        return LARGE
    return value


def _heads(key: str, config: dict[str, Any]) -> Any:
    """Many, some or one: the relation of query heads to kv heads stays."""
    queries, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if key == "num_attention_heads" or keys is None:
        return HEADS if config[key] is not None else None
    return HEADS if keys == queries else 1 if keys == 1 else HEADS // 2


def _rope(rope: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    """Lists of factors have one entry for each pair of rotated dimensions."""
    width = tiny.get("qk_rope_head_dim") or tiny.get("head_dim") or HEAD_WIDTH
    pairs = int(width * float(tiny.get("partial_rotary_factor") or 1.0)) // 2
    return {key: value[:pairs] if isinstance(value, list) else value for key, value in rope.items()}
