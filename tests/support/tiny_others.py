"""Tiny configurations of GLM, Nemotron, InternLM, Baichuan and Qwen-1: see `tests.support.tiny_models`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_base import BASE

# Architectures whose norms add 1 to the stored weights.
NORMS_AROUND_ZERO = ("NemotronForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
                     "Gemma3ForConditionalGeneration", "Qwen3NextForCausalLM")  # fmt: skip

_HEADS = {**BASE, "num_key_value_heads": None, "rms_norm_eps": 1e-6}
_ROPED = {**BASE, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None}
_PACKED = {name: BASE[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                         "num_attention_heads", "bos_token_id", "eos_token_id")}  # fmt: skip
_PACKED["rms_norm_eps"] = 1e-6
_QWEN = {**_PACKED, "intermediate_size": 96, "kv_channels": 8, "max_position_embeddings": 64, "rotary_emb_base": 10000,
         "layer_norm_epsilon": 1e-6, "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True}  # fmt: skip

_CHATGLM = {"padded_vocab_size": 131, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 8,
            "ffn_hidden_size": 48, "seq_length": 64, "layernorm_epsilon": 1e-5, "multi_query_group_num": 2,
            "add_qkv_bias": True, "add_bias_linear": False, "eos_token_id": 2}  # fmt: skip
_NAS = {**{name: BASE[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "bos_token_id",
                                         "eos_token_id", "max_position_embeddings")},
        "rms_norm_eps": 1e-5, "rope_theta": 500.0}  # fmt: skip


def _block(group: int | str, multiple: float | str) -> dict[str, Any]:
    """A layer of Nemotron-NAS: queries per key/value head and inner multiple, or "none" or "linear"."""
    halves = {"attention": ("n_heads_in_group", group), "ffn": ("ffn_mult", multiple)}
    return {
        half: {name: None if isinstance(size, str) else size, "no_op": size == "none",
               "replace_with_linear": size == "linear"}
        for half, (name, size) in halves.items()
    }  # fmt: skip


OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "BaichuanForCausalLM": {
        "rotary_2": {**_PACKED, "max_position_embeddings": 64, "model_max_length": 64, "z_loss_weight": 0},
        "alibi": {**_PACKED, "model_max_length": 64},
        "alibi_2": {**_PACKED, "model_max_length": 64, "z_loss_weight": 0, "hidden_size": 48,
                    "num_attention_heads": 12},
    },
    "BaiChuanForCausalLM": {
        "rotary": {**_PACKED, "max_position_embeddings": 64},
    },
    "ChatGLMModel": {
        "grouped": _CHATGLM,
        "wide_heads_long": {**_CHATGLM, "kv_channels": 16, "rope_ratio": 500, "multi_query_group_num": 4},
        "all_biased": {**_CHATGLM, "add_bias_linear": True, "multi_query_group_num": 1, "kv_channels": 12},
    },
    "ChatGLMForConditionalGeneration": {
        "unbiased": {**_CHATGLM, "add_qkv_bias": False},
    },
    "DeciLMForCausalLM": {
        "heads_by_layer": {**_NAS, "num_hidden_layers": 2, "intermediate_size": 48,
                           "num_key_value_heads_per_layer": [2, 1]},
        "left_out": {**_NAS, "num_hidden_layers": 4, "intermediate_size": None, "num_key_value_heads": None,
                     "block_configs": [_block(2, "none"), _block("none", 1.0), _block("none", "none"), _block(4, 3.0)]},
        "linear": {**_NAS, "num_hidden_layers": 4, "intermediate_size": None, "num_key_value_heads": None,
                   "block_configs": [_block("none", 1.0), _block("linear", "linear"), _block(1, 2.0),
                                     _block("linear", "none")]},
    },
    "GlmForCausalLM": {
        "half_rotary": {**BASE, "head_dim": 12, "pad_token_id": None},
        "unbiased_tied": {**BASE, "head_dim": 8, "pad_token_id": None, "attention_bias": False,
                          "tie_word_embeddings": True, "num_key_value_heads": 1},
        "rope_linear": {**BASE, "head_dim": 16, "pad_token_id": None, "rope_parameters":
                        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.75}},
    },
    "Glm4ForCausalLM": {
        "half_rotary": {**BASE, "head_dim": 12, "pad_token_id": None},
        "unbiased_tied": {**BASE, "head_dim": 8, "pad_token_id": None, "attention_bias": False,
                          "tie_word_embeddings": True},
        "all_heads": {**BASE, "head_dim": 16, "pad_token_id": None, "num_key_value_heads": 4, "rope_parameters":
                      {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    },
    "InternLMForCausalLM": {
        "biased": {**_HEADS, "bias": True},
        "unbiased": {**_HEADS, "bias": False, "num_attention_heads": 8},
        "rotary_dynamic": {**_HEADS, "bias": True, "max_position_embeddings": 20, "rotary":
                           {"type": "dynamic", "base": 500, "scaling_factor": 2.0}},
    },
    "InternLM2ForCausalLM": {
        "grouped": {**_ROPED, "bias": False},
        "biased": {**_ROPED, "bias": True, "num_attention_heads": 8, "num_key_value_heads": 2},
        "one_kv_head_dynamic": {**_ROPED, "bias": True, "num_key_value_heads": 1, "max_position_embeddings": 20,
                                "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    },
    "InternLM3ForCausalLM": {
        "unbiased": {**_ROPED, "qkv_bias": False, "bias": False, "head_dim": 8},
        "qkv_biased": {**_ROPED, "qkv_bias": True, "bias": False, "head_dim": 12},
        "biased_dynamic": {**_ROPED, "qkv_bias": True, "bias": True, "head_dim": 16, "max_position_embeddings": 20,
                           "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    },
    "NemotronForCausalLM": {
        "half_rotary": BASE,
        "biased": {**BASE, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        "wide_heads_tied": {**BASE, "head_dim": 24, "tie_word_embeddings": True, "hidden_act": "gelu"},
    },
    "QWenLMHeadModel": {
        "short": {**_QWEN, "seq_length": 64},
        "beyond_trained": {**_QWEN, "seq_length": 6, "kv_channels": 12},
        "biased": {**_QWEN, "no_bias": False, "use_dynamic_ntk": False, "seq_length": 8, "num_attention_heads": 8,
                   "kv_channels": 4},
    },
}  # fmt: skip
