"""Tiny configurations of state-space models and their hybrids: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

COUNTS_FROM_ZERO = ("BambaForCausalLM",)  # transformers' forward with a cache does, unless it is told positions

_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def _blocks(pattern: str) -> list[str]:
    return [_KINDS[letter] for letter in pattern]


_MAMBA = {name: BASE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id",
                                        "eos_token_id")}  # fmt: skip
_MAMBA["state_size"] = 8
_BAMBA = {**BASE, "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
_NEMOTRON_H = {
    **BASE,
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
}
_JAMBA = {**BASE, "num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
          "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}  # fmt: skip
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 24}  # fmt: skip
_MAMBA2 = {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
_QWEN3_NEXT = {**BASE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
               "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
               "linear_key_head_dim": 8, "linear_value_head_dim": 8, "full_attention_interval": 2}  # fmt: skip

STATE_SPACE: dict[str, dict[str, dict[str, Any]]] = {
    "MambaForCausalLM": {
        "tied": _MAMBA,
        "biased_untied": {**_MAMBA, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
        "odd_state": {**_MAMBA, "state_size": 5, "conv_kernel": 3, "time_step_rank": 3, "expand": 3},
    },
    "FalconMambaForCausalLM": {
        "tied": _MAMBA,
        "biased_untied": {**_MAMBA, "use_bias": True, "tie_word_embeddings": False, "mixer_rms_eps": 0.01,
                          "state_size": 6},
        "odd_state": {**_MAMBA, "state_size": 17, "conv_kernel": 2, "time_step_rank": 7},
    },
    "Mamba2ForCausalLM": {
        "grouped": _MAMBA2,
        "one_group_tied": {**_MAMBA2, "n_groups": 1, "tie_word_embeddings": True, "use_conv_bias": False},
        "biased_odd_state": {**_MAMBA2, "n_groups": 4, "use_bias": True, "state_size": 19, "conv_kernel": 3,
                             "head_dim": 24, "expand": 6},
    },
    "BambaForCausalLM": {
        "attention_last": {**_BAMBA, "attn_layer_indices": [1]},
        "attention_first_biased": {**_BAMBA, "attn_layer_indices": [0], "attention_bias": True, "mlp_bias": True,
                                   "mamba_proj_bias": True, "mamba_n_groups": 1, "tie_word_embeddings": True},
        "odd_state": {**_BAMBA, "attn_layer_indices": [1], "num_hidden_layers": 3, "mamba_conv_bias": False,
                      "mamba_d_conv": 2, "mamba_d_state": 11},
    },
    "JambaForCausalLM": {
        "attention_and_experts_last": _JAMBA,
        "experts_after_mamba_biased": {**_JAMBA, "attn_layer_offset": 0, "num_experts_per_tok": 3,
                                       "mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True,
                                       "num_key_value_heads": 1},
        "odd_sizes": {**_JAMBA, "num_hidden_layers": 3, "attn_layer_period": 3, "expert_layer_period": 3,
                      "expert_layer_offset": 0, "mamba_d_state": 5, "mamba_d_conv": 3, "mamba_dt_rank": 7,
                      "mamba_expand": 3, "num_experts_per_tok": 1},
    },
    "NemotronHForCausalLM": {
        "all_kinds": {**_NEMOTRON_H, "layers_block_type": _blocks("M-*M")},
        "biased": {**_NEMOTRON_H, "layers_block_type": _blocks("*M-"), "use_bias": True, "mlp_bias": True,
                   "use_conv_bias": False, "n_groups": 1, "num_key_value_heads": 1},
        "wide_heads": {**_NEMOTRON_H, "layers_block_type": _blocks("MM-*-"), "head_dim": 12, "mamba_head_dim": 12,
                       "conv_kernel": 3, "ssm_state_size": 5, "mlp_hidden_act": "gelu"},
        "experts": {**_NEMOTRON_H, **_EXPERTS, "layers_block_type": _blocks("ME*E")},
        "groups_of_experts": {**_NEMOTRON_H, **_EXPERTS, "layers_block_type": _blocks("EM*"), "n_routed_experts": 8,
                              "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
                              "norm_topk_prob": False},
        "experts_on_latents": {**_NEMOTRON_H, **_EXPERTS, "layers_block_type": _blocks("M*E"), "moe_latent_size": 20,
                               "mlp_bias": True, "mlp_hidden_act": "gelu"},
    },
    "Qwen3NextForCausalLM": {
        "attention_last": _QWEN3_NEXT,
        "attention_first_biased": {**_QWEN3_NEXT, "layer_types": ["full_attention", "linear_attention"],
                                   "attention_bias": True, "linear_num_key_heads": 4, "linear_key_head_dim": 5,
                                   "linear_conv_kernel_dim": 3, "num_key_value_heads": 1, "norm_topk_prob": False,
                                   "tie_word_embeddings": True},
        "odd_heads": {**_QWEN3_NEXT, "num_hidden_layers": 3, "mlp_only_layers": [0, 2],
                                  "linear_num_value_heads": 8, "linear_value_head_dim": 11, "num_experts_per_tok": 3,
                                  "rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                                                      "partial_rotary_factor": 0.5}},
    },
}  # fmt: skip
