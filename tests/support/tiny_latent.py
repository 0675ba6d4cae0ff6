"""Tiny configurations of models with latent attention: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

_LATENT = {**BASE, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12,
           "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
           "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}  # fmt: skip
_GROUPS = {"n_group": 4, "topk_group": 2}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}


def _yarn(**parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 4.0,
                                "original_max_position_embeddings": 16, **parameters}}  # fmt: skip


LATENT: dict[str, dict[str, dict[str, Any]]] = {
    "DeepseekV2ForCausalLM": {
        "limited": {**_LATENT, **_GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
        "lite_yarn": {**_LATENT, "q_lora_rank": None, "n_shared_experts": 2, "topk_method": "greedy",
                      **_yarn(mscale=0.707, mscale_all_dim=0.707)},
        "dense_biased_tied": {**_LATENT, "first_k_dense_replace": 2, "attention_bias": True,
                              "tie_word_embeddings": True, "qk_rope_head_dim": 12, **_yarn(mscale=0.5)},
    },
    "DeepseekV3ForCausalLM": {
        "yarn_groups": {**_LATENT, **_GROUPS, **_yarn(mscale=1.0, mscale_all_dim=1.0)},
        "one_group_tied": {**_LATENT, **_ONE_GROUP, "q_lora_rank": None, "tie_word_embeddings": True,
                           "first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 0.7},
        "dense_direct_queries_biased": {**_LATENT, **_ONE_GROUP, "q_lora_rank": None, "attention_bias": True,
                                        "first_k_dense_replace": 2},
        "half_split_biased": {**_LATENT, "n_group": 2, "topk_group": 1, "attention_bias": True, "v_head_dim": 8,
                              "q_lora_rank": 16, "rope_interleave": False, "n_shared_experts": 2},
    },
}  # fmt: skip
