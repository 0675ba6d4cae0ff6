"""Mistral (Jiang et al. 2023): Llama's shape with a sliding attention window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, gated_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class MistralConfig(ModelConfig):
    """No fields of its own; ``sliding_window`` holds for all layers."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("mistral",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; an absent sliding_window means 4096, null means none."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": hf.integer("sliding_window", default=4096, nullable=True),
        }


@register("MistralForCausalLM")
class MistralForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, windowed grouped-query attention with rotary positions, gated MLP."""

    config: MistralConfig
    config_class = MistralConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *gated_mlp_rules())

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
