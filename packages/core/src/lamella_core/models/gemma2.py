"""Gemma 2 (Gemma team 2024): every other layer windowed, soft-capped scores and logits, norms after each block too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.models._gemma import AlternatingGemmaConfig, GemmaBase
from lamella_core.models._rules import attention_rules, gated_mlp_rules, sandwich_norm_rules, vocabulary_rules
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(AlternatingGemmaConfig):
    """Gemma 2's own fields."""

    attention_softcap: float | None = 50.0  # scores become softcap * tanh(scores / softcap)

    hf_model_types: ClassVar[tuple[str, ...]] = ("gemma2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = super().from_hf(hf)
        return {
            **common,
            **cls.alternating_fields(hf, common["num_hidden_layers"], period=2),
            "rope": hf.rope(common["head_dim"]),
            "attention_softcap": hf.get("attn_logit_softcapping", default=50.0),
            "logit_softcap": hf.get("final_logit_softcapping", default=30.0),
        }


@register("Gemma2ForCausalLM")
class Gemma2ForCausalLM(GemmaBase):
    """Decoder with norms before and after each block: windowed or full capped attention, gated MLP."""

    config: Gemma2Config
    config_class = Gemma2Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *sandwich_norm_rules(), *attention_rules(), *gated_mlp_rules())

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
                scale=config.query_pre_attn_scalar**-0.5,
                sliding_window=config.layer_window(index),
                softcap=config.attention_softcap,
            ),
            attention_out_norm=self.make_norm(),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
            mlp_out_norm=self.make_norm(),
        )
