"""Gemma 3's text model (Gemma team 2025): five windowed layers to a full one, each kind with its own rotary base.

Compared with Gemma 2, normed queries and keys take the place of capped scores. Of checkpoints with a vision tower
(model_type "gemma3") the decoder is read: tokens of an image alone see each other in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import FULL, SLIDING
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.head_norm import HeadRMSNorm
from lamella_core.layers.mlp import GatedMLP
from lamella_core.models._gemma import AlternatingGemmaConfig, GemmaBase
from lamella_core.models._rules import (
    attention_rules,
    gated_mlp_rules,
    head_norm_rules,
    sandwich_norm_rules,
    vocabulary_rules,
)
from lamella_core.models.registry import register
from lamella_core.rope_config import RopeConfig

# What a text_config beside a vision tower leaves out where it is so.
_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class Gemma3TextConfig(AlternatingGemmaConfig):
    """No fields of its own; ``local_rope`` is that of the windowed layers."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("gemma3_text", "gemma3")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config: of the whole model, or of its decoder alone.

        Rotary bases may be in the older or the newer form. Whether the output layer is tied is said by the whole model,
        whatever its decoder's object says; such models have no final_logit_softcapping.
        """
        if hf.model_type == "gemma3":
            tied = hf.flag("tie_word_embeddings", default=True)
            text = hf.nested("text_config", _DEFAULTS, _OUTER)
            text.require("final_logit_softcapping", (None,), None)
            return {**cls.from_hf(text), "tie_word_embeddings": tied}
        common = super().from_hf(hf)
        head_dim = common["head_dim"]
        hf.require("attn_logit_softcapping", (None,), None)
        local_theta = hf.get("rope_local_base_freq", default=10000.0)
        has_kinds = SLIDING in (hf.get("rope_parameters", default=None) or {})
        local = hf.rope(head_dim, local_theta, layer_type=SLIDING) if has_kinds else None
        period = hf.integer("sliding_window_pattern", default=6)
        return {
            **common,
            **cls.alternating_fields(hf, common["num_hidden_layers"], period),
            "rope": hf.rope(head_dim, 1e6, layer_type=FULL),
            "local_rope": local or RopeConfig(rotary_dim=head_dim, theta=local_theta),
            "logit_softcap": hf.get("final_logit_softcapping", default=None),
        }


@register("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM")
class Gemma3ForCausalLM(GemmaBase):
    """Decoder with norms before and after each block: windowed or full attention of normed heads, gated MLP."""

    config: Gemma3TextConfig
    config_class = Gemma3TextConfig
    OUTER_PREFIX = "language_model."
    IGNORED = (
        "*.rotary_emb.inv_freq", "*.rotary_emb_local.inv_freq", "*vision_tower.*", "*multi_modal_projector.*"
    )  # fmt: skip
    WEIGHTS = (
        *vocabulary_rules(),
        *sandwich_norm_rules(),
        *attention_rules(),
        *head_norm_rules(),
        *gated_mlp_rules(),
    )

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
                q_norm=HeadRMSNorm(config, unit_offset=True),
                k_norm=HeadRMSNorm(config, unit_offset=True),
            ),
            attention_out_norm=self.make_norm(),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
            mlp_out_norm=self.make_norm(),
        )
