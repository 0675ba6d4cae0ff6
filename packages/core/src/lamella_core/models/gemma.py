"""Gemma (Gemma team 2024): Llama's shape with wide heads, scaled embeddings and norms by 1 + weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.models._gemma import GemmaBase, GemmaBaseConfig
from lamella_core.models._rules import attention_rules, gated_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(GemmaBaseConfig):
    """No fields of its own."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("gemma",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; "gelu" means its tanh approximation, as in training."""
        common = super().from_hf(hf)
        act = hf.get("hidden_activation", default=None) or hf.activation("hidden_act", default="gelu_pytorch_tanh")
        return {
            **common,
            "hidden_act": "gelu_pytorch_tanh" if act == "gelu" else act,
            "rope": hf.rope(common["head_dim"]),
        }


@register("GemmaForCausalLM")
class GemmaForCausalLM(GemmaBase):
    """Pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, gated MLP."""

    config: GemmaConfig
    config_class = GemmaConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *gated_mlp_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        bias = config.attention_bias
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=bias, out_bias=bias),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )
