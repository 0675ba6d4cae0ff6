"""Tiny configurations of Gemma and of other dense decoders: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

Variants = dict[str, dict[str, Any]]
_SLIDING_FIRST = ["sliding_attention", "full_attention"]
_PAD = {"pad_token_id": None}


def _seeing(text: dict[str, Any], **outer: Any) -> dict[str, Any]:
    """Gemma 3 beside a vision tower."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    decoder = {**BASE, **_PAD, "layer_types": _SLIDING_FIRST, **text}
    return {
        "text_config": decoder,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "image_token_index": 130,
        **outer,
    }


_OWN: dict[str, Variants] = {
    "GemmaForCausalLM": {
        "tied": {**_PAD, "head_dim": 16},
        "one_kv_head": {**_PAD, "head_dim": 8, "num_key_value_heads": 1, "hidden_act": "gelu"},
        "biased_untied": {**_PAD, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": False},
    },
    "Gemma2ForCausalLM": {
        "window": {**_PAD, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24},
        "low_caps": {**_PAD, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0,
                     "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
        "uncapped": {**_PAD, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": None,
                     "final_logit_softcapping": None, "layer_types": _SLIDING_FIRST[::-1]},
    },
    "Gemma3ForCausalLM": {
        "two_bases": {**_PAD, "head_dim": 16, "sliding_window": 6, "layer_types": _SLIDING_FIRST,
                      "query_pre_attn_scalar": 24},
        "scaled_full": {**_PAD, "head_dim": 8, "sliding_window": 5, "layer_types": _SLIDING_FIRST[::-1],
                        "rope_parameters": {
                            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}},
        "capped_untied": {**_PAD, "head_dim": 8, "sliding_window": 4, "num_key_value_heads": 1,
                          "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
    },
    "Gemma3ForConditionalGeneration": {
        "nested": _seeing({"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24,
                           "tie_word_embeddings": False}, tie_word_embeddings=True),
        "scaled_full": _seeing({"head_dim": 8, "sliding_window": 5, "num_key_value_heads": 1, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
        "biased_untied": _seeing({"head_dim": 8, "sliding_window": 4, "attention_bias": True},
                                 tie_word_embeddings=False),
    },
    "MllamaForCausalLM": {
        "one_skipped": {**_PAD, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        "last_skipped": {**_PAD, "num_hidden_layers": 4, "cross_attention_layers": [1, 3], "num_key_value_heads": 1},
        "rope_llama3": {**_PAD, "num_hidden_layers": 3, "cross_attention_layers": [2], "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    },
    "MllamaForConditionalGeneration": {
        "whole": {**_PAD, "num_hidden_layers": 3, "cross_attention_layers": [1]},
    },
    "Qwen3ForCausalLM": {
        "grouped": {"head_dim": 16},
        "one_kv_head_tied": {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "biased_window": {"head_dim": 12, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6,
                          "max_window_layers": 1},
    },
    "PhiForCausalLM": {
        "half_rotary": {"num_key_value_heads": 4},
        "grouped": {"hidden_act": "gelu", "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0,
                                                              "partial_rotary_factor": 0.25}},
        "one_kv_head": {"num_key_value_heads": 1, "intermediate_size": 40, "rope_parameters":
                        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 1.0}},
    },
    "Phi3ForCausalLM": {
        "window": {**_PAD, "sliding_window": 6},
        "longrope": {**_PAD, "max_position_embeddings": 80, "original_max_position_embeddings": 20,
                     "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
                                         "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}},
        "partial_longrope_tied": {
            **_PAD, "max_position_embeddings": 80, "original_max_position_embeddings": 20, "num_key_value_heads": 1,
            "tie_word_embeddings": True, "hidden_act": "gelu", "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5], "long_factor": [1.0, 3.0]}},
    },
    "Olmo2ForCausalLM": {
        "grouped": _PAD,
        "one_kv_head_tied": {**_PAD, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "biased": {**_PAD, "num_key_value_heads": 4, "attention_bias": True},
    },
    "GraniteForCausalLM": {
        "multiplied": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5,
                       "logits_scaling": 2.0},
        "biased_tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                        "attention_multiplier": 0.35, "embedding_multiplier": 1.5, "logits_scaling": 1.3},
        "one_kv_head": {"num_key_value_heads": 1, "residual_multiplier": 0.22, "head_dim": 12},
    },
    "CohereForCausalLM": {
        "tied": {**_PAD, "logit_scale": 0.5},
        "normed_heads": {**_PAD, "use_qk_norm": True, "logit_scale": 1.5, "num_key_value_heads": 1},
        "biased_untied": {**_PAD, "attention_bias": True, "use_qk_norm": True, "logit_scale": 0.75,
                          "tie_word_embeddings": False, "rope_parameters":
                          {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    },
    "Cohere2ForCausalLM": {
        "window_first": {**_PAD, "logit_scale": 0.5, "sliding_window": 6, "layer_types": _SLIDING_FIRST},
        "full_first": {**_PAD, "logit_scale": 0.75, "sliding_window": 4, "layer_types": _SLIDING_FIRST[::-1],
                       "attention_bias": True, "num_key_value_heads": 1},
        "all_windows_untied": {**_PAD, "logit_scale": 1.5, "sliding_window": 5, "tie_word_embeddings": False},
    },
    "StableLmForCausalLM": {
        "quarter_rotary": {},
        "normed_heads": {"qk_layernorm": True, "use_qkv_bias": True, "num_key_value_heads": 1},
        "parallel": {"qk_layernorm": True, "use_parallel_residual": True, "tie_word_embeddings": True,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    },
    "SmolLM3ForCausalLM": {
        "last_unrotated": {**_PAD, "no_rope_layer_interval": 2},
        "first_unrotated": {**_PAD, "no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True,
                            "tie_word_embeddings": False},
        "window": {**_PAD, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 5,
                   "num_key_value_heads": 1},
    },
    "Exaone4ForCausalLM": {
        "window_first": {"sliding_window": 6, "sliding_window_pattern": 2},
        "no_window": {"sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
        "full_first": {"sliding_window": 4, "layer_types": _SLIDING_FIRST[::-1], "head_dim": 12,
                       "num_key_value_heads": 1},
    },
}  # fmt: skip

DENSE = {
    name: {key: own if "text_config" in own else {**BASE, **own} for key, own in variants.items()}
    for name, variants in _OWN.items()
}
