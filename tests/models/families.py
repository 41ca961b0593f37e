"""Tiny random models of every family that shoal promises: 4 layers, with their peculiarities.

FAMILIES compute in the exact class, too; HYBRIDS, which keep running states, only in floats.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {**COMMON, "head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "model_type": "llama"},
    "llama-tied": {**COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**COMMON, "model_type": "mistral", "sliding_window": 16},
    "qwen2": {**COMMON, "model_type": "qwen2"},
    "qwen3": {**COMMON, "model_type": "qwen3", "head_dim": 32},
    "phi3": {**COMMON, "model_type": "phi3"},
    "gemma2": {
        **COMMON,
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    },
    "glm4": {**COMMON, "model_type": "glm4", "head_dim": 16},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**COMMON, **MIXTURE, "model_type": "mixtral"},
    "qwen3_moe": {**EXPERTS, "model_type": "qwen3_moe", "num_experts": 8, "decoder_sparse_step": 1},
    "gpt_oss": {**COMMON, **MIXTURE, "model_type": "gpt_oss", "head_dim": 16, "sliding_window": 8},
    "glm4_moe": {
        **EXPERTS,
        "model_type": "glm4_moe",
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "minimax_m2": {**COMMON, **MIXTURE, "model_type": "minimax_m2", "head_dim": 16},
    "deepseek_v2": {**LATENT, "model_type": "deepseek_v2", "topk_method": "greedy"},
    "deepseek_v3": {**LATENT, "model_type": "deepseek_v3"},
}
FAMILIES = {**DENSE, **MIXTURES}
DELTA = {
    **EXPERTS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
SHARED_EXPERT = {"num_experts": 8, "shared_expert_intermediate_size": 32}
SHORT_CONV = {**EXPERTS, "layer_types": ["conv", "full_attention", "conv", "conv"]}
MAMBA = {
    **COMMON,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**DELTA, **SHARED_EXPERT, "model_type": "qwen3_next"},
    "qwen3_5_text": {**DELTA, "model_type": "qwen3_5_text"},
    "qwen3_5_moe_text": {**DELTA, **SHARED_EXPERT, "model_type": "qwen3_5_moe_text"},
    "olmo_hybrid": {**DELTA, "model_type": "olmo_hybrid"},
    "kimi_linear": {
        **LATENT,
        "model_type": "kimi_linear",
        "linear_attn_config": {
            "head_dim": 16,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
            "full_attn_layers": [3],  # counted from 1
            "kda_layers": [1, 2, 4],
        },
    },
    "lfm2": {**SHORT_CONV, "model_type": "lfm2"},
    "lfm2_moe": {
        **SHORT_CONV,
        "model_type": "lfm2_moe",
        "num_experts": 8,
        "num_dense_layers": 1,
    },
    "granitemoehybrid": {
        **MAMBA,
        **MIXTURE,
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
    },
    "bamba": {**MAMBA, "model_type": "bamba", "attn_layer_indices": [2]},
    "falcon_h1": {**MAMBA, "model_type": "falcon_h1", "mamba_d_ssm": 128},  # both in every layer
}
EVERY = {**FAMILIES, **HYBRIDS}
