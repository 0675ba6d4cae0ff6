"""OLMo 2 (OLMo team 2024): norms after attention and MLP instead of before, and over all queries and all keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import PostNormDecoderLayer
from lamella_core.layers.head_norm import ProjectionRMSNorm
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import (
    attention_rules,
    gated_mlp_rules,
    head_norm_rules,
    post_norm_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(ModelConfig):
    """OLMo 2's own fields."""

    attention_bias: bool = False  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("olmo2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"]),
            "attention_bias": hf.flag("attention_bias", default=False),
        }


@register("Olmo2ForCausalLM")
class Olmo2ForCausalLM(CausalLM):
    """Post-norm decoder: grouped-query attention of normed projections, gated MLP, RMSNorm after each."""

    config: Olmo2Config
    config_class = Olmo2Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *post_norm_rules(),
        *attention_rules(),
        *head_norm_rules(),
        *gated_mlp_rules(),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return PostNormDecoderLayer(
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                q_norm=ProjectionRMSNorm(config, config.num_attention_heads),
                k_norm=ProjectionRMSNorm(config, config.num_key_value_heads),
            ),
            attention_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
            mlp_norm=self.make_norm(),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
