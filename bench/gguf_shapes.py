"""Writes a GGUF file of a Llama-shaped model with random weights, for llama.cpp as a peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants

FILE_TYPES = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}


def write_gguf(path: Path, config: dict[str, Any], kind: str) -> None:
    """One random matrix for each shape: enough for speed."""
    hidden, layers, wide = (
        config[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, vocabulary = hidden // heads, config["vocab_size"]
    writer = gguf.GGUFWriter(path, "llama")
    stored = getattr(gguf.GGMLQuantizationType, kind)
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_file_type(FILE_TYPES[kind])
    chance, made = np.random.default_rng(0), {}
    ones = np.ones(hidden, np.float32)

    def linear(name: str, outputs: int, inputs: int) -> None:
        if (outputs, inputs) not in made:
            weight = chance.standard_normal((outputs, inputs), dtype=np.float32) / inputs**0.5
            made[outputs, inputs] = quants.quantize(weight, stored)
        writer.add_tensor(f"{name}.weight", made[outputs, inputs], raw_dtype=stored)

    linear("token_embd", vocabulary, hidden)
    if not config.get("tie_word_embeddings"):
        linear("output", vocabulary, hidden)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(layers):
        block = f"blk.{layer}."
        writer.add_tensor(f"{block}attn_norm.weight", ones)
        writer.add_tensor(f"{block}ffn_norm.weight", ones)
        linear(f"{block}attn_q", heads * width, hidden)
        linear(f"{block}attn_k", kv_heads * width, hidden)
        linear(f"{block}attn_v", kv_heads * width, hidden)
        linear(f"{block}attn_output", hidden, heads * width)
        linear(f"{block}ffn_gate", wide, hidden)
        linear(f"{block}ffn_up", wide, hidden)
        linear(f"{block}ffn_down", hidden, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
