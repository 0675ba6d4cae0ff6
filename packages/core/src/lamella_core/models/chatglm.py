"""ChatGLM2, ChatGLM3 and GLM-4 in their first layout (GLM team 2024): few key/value heads, half of each head rotates.

`lamella_core.models.glm` is the same network under transformers' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register
from lamella_core.rope_config import RopeConfig

_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class ChatGLMConfig(ModelConfig):
    """ChatGLM's own fields."""

    qkv_bias: bool = True
    linear_bias: bool = False  # of all other projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("chatglm",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        for name, usual in (("rmsnorm", True), ("multi_query_attention", True), ("original_rope", True)):
            hf.require(name, (usual,), usual)
        hf.require("apply_residual_connection_post_layernorm", (False,), False)
        hf.require("post_layer_norm", (True,), True)
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        head_dim = hf.integer("kv_channels", default=hidden // heads)
        return {
            "vocab_size": hf.integer("padded_vocab_size", "vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("num_layers", "num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": hf.integer("multi_query_group_num", default=1),
            "head_dim": head_dim,
            "intermediate_size": hf.integer("ffn_hidden_size"),
            "max_position_embeddings": hf.integer("seq_length"),
            "norm_eps": hf.get("layernorm_epsilon", default=1e-5),
            "rope": RopeConfig(
                rotary_dim=head_dim // 2, theta=_THETA * hf.number("rope_ratio", default=1.0), interleaved=True
            ),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=False),
            "qkv_bias": hf.flag("add_qkv_bias", default=False) or hf.flag("add_bias_linear", default=False),
            "linear_bias": hf.flag("add_bias_linear", default=False),
            **hf.token_ids(),
        }


def _rules() -> Sequence[WeightRule]:
    source, target = "transformer.encoder.layers.{i}.", "layers.{i}."
    names = {
        "input_layernorm": "input_norm",
        "self_attention.dense": "attention.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    fused = {
        "self_attention.query_key_value": ("attention.qkv_proj", ("q", "k", "v")),
        "mlp.dense_h_to_4h": ("mlp.gate_up_proj", ("gate", "up")),
    }
    return (
        WeightRule("transformer.embedding.word_embeddings.weight", "embed_tokens.weight"),
        WeightRule("transformer.encoder.final_layernorm.weight", "norm.weight"),
        WeightRule("transformer.output_layer.weight", "lm_head.weight"),
        *module_rules(names, source, target),
        *(
            WeightRule(f"{source}{old}.{leaf}", f"{target}{new}.{leaf}", section=sections)
            for old, (new, sections) in fused.items()
            for leaf in ("weight", "bias")
        ),
    )


@register("ChatGLMModel", "ChatGLMForConditionalGeneration")
class ChatGLMModel(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention, gated MLP."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    SOURCE_PREFIX = "transformer."
    IGNORED = ("*rotary_pos_emb.inv_freq",)
    WEIGHTS = _rules()

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config, index, name=f"{name}.attention", qkv_bias=config.qkv_bias, out_bias=config.linear_bias
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp", bias=config.linear_bias),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
