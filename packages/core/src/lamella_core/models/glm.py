"""GLM-4 (GLM team 2024) as transformers has it: half of every head rotates in neighbouring pairs, gate and up are one.

The same weights in their first layout are of model_type "chatglm".
"""

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
from lamella_core.models._rules import attention_rules, fused_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class GlmConfig(ModelConfig):
    """GLM-4's own fields."""

    attention_bias: bool = True  # of the query, key and value projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("glm",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1.5625e-7),
            "rope": hf.rope(common["head_dim"], default_partial=0.5, interleaved=True),
            "attention_bias": hf.flag("attention_bias", default=True),
        }


@register("GlmForCausalLM")
class GlmForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention with biased projections, gated MLP."""

    config: GlmConfig
    config_class = GlmConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *fused_mlp_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=config.attention_bias),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
