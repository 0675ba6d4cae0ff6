"""Phi-3 and Phi-4 (Abdin et al. 2024): Mistral's shape, stored with fused projections; longrope for long contexts."""

from __future__ import annotations

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
from lamella_core.models._rules import fused_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Phi3Config(ModelConfig):
    """No fields of its own; ``sliding_window`` holds for all layers."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("phi3",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": hf.integer("sliding_window", default=None, nullable=True),
        }


@register("Phi3ForCausalLM")
class Phi3ForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, windowed grouped-query attention with rotary positions, gated MLP."""

    config: Phi3Config
    config_class = Phi3Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *norm_rules(),
        WeightRule("model.layers.{i}.self_attn.qkv_proj.weight", "layers.{i}.attention.qkv_proj.weight"),
        WeightRule("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.o_proj.weight"),
        *fused_mlp_rules(),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", sliding_window=config.sliding_window),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
