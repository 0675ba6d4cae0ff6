"""Tiny configurations of the GPT line: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

TOKENS = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2}
GPT2_BASE = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NEOX = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
_QUARTER = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25}
_OPT = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 64}  # fmt: skip
_BLOOM = {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_MPT = {**TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
EAGER_IS_WRONG = ("FalconForCausalLM",)  # transformers' eager attention adds ALiBi twice there, its sdpa once
_FALCON = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

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
    "GPTJForCausalLM": {
        "half_rotary": {**GPT2_BASE, "rotary_dim": 4},
        "all_rotary": {**GPT2_BASE, "rotary_dim": 8, "n_inner": 40, "activation_function": "gelu"},
        "odd_heads": {**GPT2_BASE, "n_embd": 48, "n_head": 6, "rotary_dim": 2},
    },
    "GPTNeoXForCausalLM": {
        "parallel": {**_NEOX, "rope_parameters": {**_QUARTER, "partial_rotary_factor": 0.5}},
        "sequential": {**_NEOX, "use_parallel_residual": False, "rope_parameters": _QUARTER},
        "unbiased_tied": {**_NEOX, "attention_bias": False, "tie_word_embeddings": True, "num_attention_heads": 2},
        "rope_linear": {**_NEOX, "rope_parameters": {**_QUARTER, "rope_type": "linear", "factor": 2.0,
                                                     "partial_rotary_factor": 1.0}},
    },
    "OPTForCausalLM": {
        "norm_before": _OPT,
        "norm_after_narrow": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24},
        "no_final_norm": {**_OPT, "_remove_final_layer_norm": True, "enable_bias": False,
                          "tie_word_embeddings": False, "activation_function": "gelu"},
        "bare_norms_wide": {**_OPT, "layer_norm_elementwise_affine": False, "word_embed_proj_dim": 48},
    },
    "BloomForCausalLM": {
        "four_heads": _BLOOM,
        "six_heads": {**_BLOOM, "n_head": 6, "hidden_size": 48},
        "normed_stream": {**_BLOOM, "n_head": 2, "apply_residual_connection_post_layernorm": True,
                          "tie_word_embeddings": False},
    },
    "MptForCausalLM": {
        "four_heads": _MPT,
        "six_heads": {**_MPT, "n_heads": 6, "d_model": 48},
        "clipped": {**_MPT, "n_heads": 2, "attn_config": {"clip_qkv": 0.6, "softmax_scale": 0.2}},
    },
    "MPTForCausalLM": {
        "grouped": {**_MPT, "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True}},
        "one_kv_head": {**_MPT, "n_heads": 6, "d_model": 48, "expansion_ratio": 2, "attn_config": {
            "attn_type": "multiquery_attention", "clip_qkv": 0.6, "alibi_bias_max": 4}},
        "one_normed_kv_head": {**_MPT, "attn_config": {"attn_type": "multiquery_attention", "qk_ln": True,
                                                       "clip_qkv": 1.5}},
    },
    "FalconForCausalLM": {
        "one_kv_head": _FALCON,
        "two_norms_grouped": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "one_norm_grouped": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True,
                             "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "ffn_hidden_size": 40},
        "sequential_alibi": {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
                             "num_attention_heads": 12, "hidden_size": 48},
        "one_kv_head_alibi": {**_FALCON, "alibi": True, "num_attention_heads": 6, "hidden_size": 48},
    },
    "RWForCausalLM": {
        "refined_web": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "refined_web_model": _FALCON,
        "all_kv_heads": {**_FALCON, "multi_query": False},
    },
}  # fmt: skip
