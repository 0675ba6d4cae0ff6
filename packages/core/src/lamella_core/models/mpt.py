"""MPT (MosaicML 2023): ALiBi instead of positions, no biases at all; queries, keys and values clipped or normed.

Grouped or shared keys and values, norms of queries and keys and alibi_bias_max are those of MosaicML's own code
(architecture MPTForCausalLM), which transformers does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.alibi import alibi_slopes
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.head_norm import ProjectionLayerNorm
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class MptConfig(ModelConfig):
    """MPT's own fields."""

    alibi_bias_max: float = 8.0
    softmax_scale: float | None = None  # multiplies the scores; None: head_dim ** -0.5
    clip_qkv: float | None = None
    qk_ln: bool = False  # norms of all queries and of all keys together

    hf_model_types: ClassVar[tuple[str, ...]] = ("mpt",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; attn_config holds those of the attention."""
        hidden, heads = hf.integer("d_model", "hidden_size"), hf.integer("n_heads", "num_attention_heads")
        hf.require("no_bias", (True,), True)
        hf.require("norm_type", ("low_precision_layernorm", "layernorm"), "low_precision_layernorm")
        hf.require("logit_scale", (None,), None)
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("n_layers", "num_hidden_layers"),
            "num_attention_heads": heads,
            "head_dim": hf.head_dim(hidden, heads),
            "intermediate_size": hf.integer("expansion_ratio", default=4) * hidden,
            "max_position_embeddings": hf.integer("max_seq_len", default=2048),
            "norm_eps": hf.get("layer_norm_epsilon", default=1e-5),
            "hidden_act": "gelu",
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            **_attention_fields(hf.nested("attn_config"), heads),
            **hf.token_ids(),
        }


def _attention_fields(hf: HfConfig, heads: int) -> dict[str, Any]:
    """Returns the fields read from attn_config."""
    hf.require("alibi", (True,), True)
    for name in ("prefix_lm", "qk_gn", "attn_uses_sequence_id", "rope"):
        hf.require(name, (False, None), False)
    hf.require("sliding_window_size", (-1, None), None)
    kind = hf.require(
        "attn_type", ("multihead_attention", "multiquery_attention", "grouped_query_attention"), "multihead_attention"
    )
    kv_heads = {"multihead_attention": heads, "multiquery_attention": 1}.get(kind)
    return {
        "num_key_value_heads": kv_heads or hf.integer("kv_n_heads"),
        "qk_ln": hf.flag("qk_ln", default=False),
        "alibi_bias_max": hf.get("alibi_bias_max", default=8.0),
        "softmax_scale": hf.get("softmax_scale", default=None),
        "clip_qkv": hf.get("clip_qkv", default=None) or None,
    }


def _rules() -> list[WeightRule]:
    layer = {
        "norm_1": "input_norm",
        "norm_2": "mlp_norm",
        "attn.Wqkv": "attention.qkv_proj",
        "attn.q_ln": "attention.q_norm",
        "attn.k_ln": "attention.k_norm",
        "attn.out_proj": "attention.o_proj",
        "ffn.up_proj": "mlp.up_proj",
        "ffn.down_proj": "mlp.down_proj",
    }
    return [
        *module_rules({"transformer.wte": "embed_tokens", "transformer.norm_f": "norm", "lm_head": "lm_head"}),
        *module_rules(layer, "transformer.blocks.{i}.", "layers.{i}."),
    ]


@register("MptForCausalLM", "MPTForCausalLM")
class MptForCausalLM(CausalLM):
    """Pre-norm decoder: LayerNorm without bias, attention with ALiBi, plain MLP."""

    config: MptConfig
    config_class = MptConfig
    SOURCE_PREFIX = "transformer."
    WEIGHTS = tuple(_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                scale=config.softmax_scale,
                alibi_slopes=alibi_slopes(heads, config.alibi_bias_max),
                clip_qkv=config.clip_qkv,
                q_norm=ProjectionLayerNorm(config, heads) if config.qk_ln else None,
                k_norm=ProjectionLayerNorm(config, kv_heads) if config.qk_ln else None,
            ),
            mlp_norm=self.make_norm(),
            mlp=MLP(config, name=f"{name}.mlp", bias=False),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype, bias=False)
