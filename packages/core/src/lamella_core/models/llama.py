"""Llama 1 to 3.x and its many relatives (Touvron et al. 2023, Grattafiori et al. 2024)."""

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
class LlamaConfig(ModelConfig):
    """Llama's own fields."""

    attention_bias: bool = False  # of the query, key, value and output projections
    mlp_bias: bool = False

    hf_model_types: ClassVar[tuple[str, ...]] = ("llama",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"]),
            "attention_bias": hf.flag("attention_bias", default=False),
            "mlp_bias": hf.flag("mlp_bias", default=False),
        }


@register("LlamaForCausalLM")
class LlamaForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, gated MLP."""

    config: LlamaConfig
    config_class = LlamaConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *gated_mlp_rules())

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
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp", bias=config.mlp_bias),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
