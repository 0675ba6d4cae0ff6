"""Tiny configurations of mixtures of experts: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

EXPERTS: dict[str, dict[str, dict[str, Any]]] = {
    "MixtralForCausalLM": {
        "top2": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
        "top1_window": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 6,
                        "num_key_value_heads": 1},
    },
    "Qwen2MoeForCausalLM": {
        "shared": {**BASE, **_EXPERTS, "shared_expert_intermediate_size": 40},
        "some_dense": {**BASE, **_EXPERTS, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 3,
                       "norm_topk_prob": True, "mlp_only_layers": [0], "qkv_bias": False},
        "stepped_window": {**BASE, **_EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2,
                           "use_sliding_window": True, "sliding_window": 6, "tie_word_embeddings": True},
    },
}  # fmt: skip
