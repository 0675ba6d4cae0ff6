"""Tiny configurations of the GPT line: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

TOKENS = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2}
GPT2_BASE = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

GPT_LINE: dict[str, dict[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": {
        "tied": GPT2_BASE,
        "layer_scaled": {**GPT2_BASE, "scale_attn_by_inverse_layer_idx": True, "n_inner": 40,
                         "tie_word_embeddings": False, "activation_function": "gelu"},
        "unscaled": {**GPT2_BASE, "scale_attn_weights": False, "activation_function": "relu"},
    },
    "GPTBigCodeForCausalLM": {
        "one_kv_head": GPT2_BASE,
        "all_kv_heads": {**GPT2_BASE, "multi_query": False, "tie_word_embeddings": False, "n_inner": 40},
        "unscaled": {**GPT2_BASE, "scale_attn_weights": False, "activation_function": "gelu"},
    },
    "GPT2LMHeadCustomModel": {
        "one_kv_head": GPT2_BASE,
        "all_kv_heads": {**GPT2_BASE, "multi_query": False, "n_inner": 40},
        "untied": {**GPT2_BASE, "tie_word_embeddings": False},
    },
    "Starcoder2ForCausalLM": {
        "window": {**BASE, "sliding_window": 6},
        "unbiased": {**BASE, "num_key_value_heads": 4, "use_bias": False, "tie_word_embeddings": False},
        "one_kv_head": {**BASE, "num_key_value_heads": 1, "hidden_act": "gelu", "rope_parameters":
                        {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
    },
}  # fmt: skip
