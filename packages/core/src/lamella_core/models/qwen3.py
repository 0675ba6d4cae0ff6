"""Qwen3 (Yang et al. 2025): Qwen2's shape with normed heads in place of biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.head_norm import HeadRMSNorm
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import (
    attention_rules,
    gated_mlp_rules,
    head_norm_rules,
    norm_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.qwen2 import Qwen2Config
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Qwen3's own fields."""

    attention_bias: bool = False  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("qwen3",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        head_dim = hf.integer("head_dim", default=128)
        return {
            **super().from_hf(hf),
            "head_dim": head_dim,
            "rope": hf.rope(head_dim),
            "attention_bias": hf.flag("attention_bias", default=False),
        }


@register("Qwen3ForCausalLM")
class Qwen3ForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention of normed heads, gated MLP."""

    config: Qwen3Config
    config_class = Qwen3Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *head_norm_rules(), *gated_mlp_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                sliding_window=config.layer_window(index),
                q_norm=HeadRMSNorm(config),
                k_norm=HeadRMSNorm(config),
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
