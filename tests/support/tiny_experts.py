"""Tiny configurations of mixtures of experts: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LLAMA4 = {**BASE, "intermediate_size": 16, "intermediate_size_mlp": 40, "head_dim": 8, "pad_token_id": None,
           "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 5, "floor_scale": 4,
           "attn_scale": 0.3}  # fmt: skip
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Both lists are the same: transformers' PhiMoE keeps the short factors beyond the original length.
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20, "factor": 4.0,
         "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 1.1, 1.5, 2.0],
         "short_mscale": 1.1, "long_mscale": 1.3}  # fmt: skip

_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
         "truncate": False, "original_max_position_embeddings": 16}  # fmt: skip

# A variant's name seeds its weights. PhiMoE weighs near experts together and drops others: in these, no score is so
# near a boundary that half precision crosses it.
EXPERTS: dict[str, dict[str, dict[str, Any]]] = {
    "MixtralForCausalLM": {
        "top2": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
        "top1_window": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 6,
                        "num_key_value_heads": 1},
    },
    "Llama4ForCausalLM": {
        "chunks_and_unrotated": {**_LLAMA4, "no_rope_layers": [1, 0]},
        "some_dense_top2": {**_LLAMA4, "no_rope_layers": [1, 1], "num_experts_per_tok": 2, "use_qk_norm": False,
                            "interleave_moe_layer_step": 2, "attention_chunk_size": 7},
        "wide_heads_llama3": {**_LLAMA4, "head_dim": 16, "no_rope_layers": [0, 1], "attn_temperature_tuning": False,
                              "num_key_value_heads": 1, "attention_bias": True, "rope_parameters": {
                                  "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    },
    "Llama4ForConditionalGeneration": {
        "nested": {**_LLAMA4, "no_rope_layers": [1, 0]},
    },
    "Qwen2MoeForCausalLM": {
        "shared": {**BASE, **_EXPERTS, "shared_expert_intermediate_size": 40},
        "some_dense": {**BASE, **_EXPERTS, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 3,
                       "norm_topk_prob": True, "mlp_only_layers": [0], "qkv_bias": False},
        "stepped_window": {**BASE, **_EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2,
                           "use_sliding_window": True, "sliding_window": 6, "tie_word_embeddings": True},
    },
    "PhimoeForCausalLM": {
        "jitter": {**BASE, **_LOCAL, "router_jitter_noise": 0.3},
        "longrope_biased": {**BASE, **_LOCAL, "attention_bias": True, "lm_head_bias": True, "sliding_window": 12,
                            "router_jitter_noise": 0.1, "max_position_embeddings": 80, "rope_parameters": _LONG},
        "tied_all_heads": {**BASE, **_LOCAL, "tie_word_embeddings": True, "num_key_value_heads": 4},
    },
    "PhiMoEForCausalLM": {
        "rope_scaling": {**BASE, **_LOCAL, "lm_head_bias": True, "max_position_embeddings": 80,
                         "rope_parameters": _LONG},
    },
    "Qwen3MoeForCausalLM": {
        "wide_heads": {**BASE, **_EXPERTS, "head_dim": 12, "norm_topk_prob": True},
        "some_dense_biased": {**BASE, **_EXPERTS, "num_experts_per_tok": 3, "mlp_only_layers": [1],
                              "attention_bias": True},
        "stepped_window": {**BASE, **_EXPERTS, "decoder_sparse_step": 2, "use_sliding_window": True,
                           "sliding_window": 6, "tie_word_embeddings": True, "num_key_value_heads": 1},
    },
    "GptOssForCausalLM": {
        "yarn": {**BASE, **_LOCAL, "head_dim": 8, "sliding_window": 6, "rope_parameters": _YARN},
        "clamped_tied": {**BASE, **_LOCAL, "head_dim": 16, "sliding_window": 4, "num_experts_per_tok": 3,
                         "swiglu_limit": 0.4, "swiglu_alpha": 1.2, "tie_word_embeddings": True,
                         "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": _YARN},
        "packable": {**BASE, **_LOCAL, "hidden_size": 64, "intermediate_size": 64, "head_dim": 8, "sliding_window": 5,
                     "rope_parameters": _YARN},  # sizes that MXFP4 can have, also of two ranks' halves
        "one_kv_head_unbiased": {**BASE, **_LOCAL, "head_dim": 8, "sliding_window": 9,
                          "attention_bias": False, "num_key_value_heads": 1, "intermediate_size": 40,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    },
}  # fmt: skip
