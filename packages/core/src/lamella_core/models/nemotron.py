"""Nemotron-3, Nemotron-4 and Minitron (Parmar et al. 2024): LayerNorm of weights around 0, an MLP of squared ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm1P
from lamella_core.models._rules import (
    attention_rules,
    norm_bias_rules,
    norm_rules,
    plain_mlp_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class NemotronConfig(ModelConfig):
    """Nemotron's own fields."""

    attention_bias: bool = False  # of the query, key, value and output projections
    mlp_bias: bool = False

    hf_model_types: ClassVar[tuple[str, ...]] = ("nemotron",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "hidden_act": hf.activation("hidden_act", default="relu2"),
            "norm_eps": hf.get("norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], default_partial=0.5),
            "attention_bias": hf.flag("attention_bias", default=False),
            "mlp_bias": hf.flag("mlp_bias", default=False),
        }


@register("NemotronForCausalLM")
class NemotronForCausalLM(CausalLM):
    """Pre-norm decoder: LayerNorm, grouped-query attention with partly rotary heads, plain MLP."""

    config: NemotronConfig
    config_class = NemotronConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *norm_bias_rules(), *attention_rules(), *plain_mlp_rules())

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
            mlp=MLP(config, name=f"{name}.mlp", bias=config.mlp_bias),
        )

    def make_norm(self) -> LayerNorm1P:
        return LayerNorm1P(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
