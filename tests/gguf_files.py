"""Small GGUF files as llama.cpp's own converter writes them, made with the `gguf` package."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
NORMAL, CONTROL = 1, 3


def write_gguf(folder: Path, path: Path, dtype: type = np.float32, pre: str = "qwen2") -> Path:
    """Convert a checkpoint of the llama, qwen2 or qwen3 family, and its tokenizer if it has one."""
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(str(path), family)
    _write_shape(writer, config)
    _write_tokenizer(writer, folder, config, pre)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            tensor = _rotated_in_pairs(tensor, config[heads])
        values = tensor.float().numpy()
        stored = np.float32 if values.ndim == 1 else dtype
        writer.add_tensor(_gguf_name(name), values.astype(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_shape(writer: gguf.GGUFWriter, config: dict) -> None:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict, pre: str) -> None:
    if not (folder / "tokenizer.json").is_file():
        writer.add_tokenizer_model("none")
        return
    known = json.loads((folder / "tokenizer.json").read_text())
    special = {entry["id"] for entry in known["added_tokens"]}
    tokens = sorted(known["model"]["vocab"], key=known["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if at in special else NORMAL for at in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in known["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    words = folder / "tokenizer_config.json"
    template = json.loads(words.read_text()).get("chat_template") if words.is_file() else None
    if template:
        writer.add_chat_template(template)


def _gguf_name(name: str) -> str:
    if name in ENDS:
        return ENDS[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def _rotated_in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring values of a head, transformers its halves."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_sentencepiece(path: Path) -> Path:
    """A vocabulary of SentencePiece's kind, without a model: letters, bytes and some words."""
    words = [
        "▁t",
        "he",
        "▁the",
        "▁I",
        "▁n",
        "ai",
        "on",
        "▁don",
        "12",
        "34",
        "▁1",
        "no",
        "▁▁",
        "▁na",
    ]
    letters = [chr(code) for code in range(33, 127)] + ["▁", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    kinds = [2, CONTROL, CONTROL, *[6] * 256, *[NORMAL] * (len(tokens) - 259)]
    ranks = {word: -float(at + 1) for at, word in enumerate([*words, *letters])}
    writer = gguf.GGUFWriter(str(path), "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([ranks.get(token, 0.0) for token in tokens])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
