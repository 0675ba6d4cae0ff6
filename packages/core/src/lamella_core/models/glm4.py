"""GLM-4-0414 (GLM team 2025): GLM-4 with norms behind the attention and the MLP as well as before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, fused_mlp_rules, module_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.glm import GlmConfig
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Glm4Config(GlmConfig):
    """No fields beyond GLM-4's."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("glm4",)


def _out_norm_rules() -> list[WeightRule]:
    names = {"post_self_attn_layernorm": "attention_out_norm", "post_mlp_layernorm": "mlp_out_norm"}
    return module_rules(names, "model.layers.{i}.", "layers.{i}.")


@register("Glm4ForCausalLM")
class Glm4ForCausalLM(CausalLM):
    """Decoder with norms around each block: RMSNorm, grouped-query attention with biased projections, gated MLP."""

    config: Glm4Config
    config_class = Glm4Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *_out_norm_rules(), *attention_rules(), *fused_mlp_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=config.attention_bias),
            attention_out_norm=self.make_norm(),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
            mlp_out_norm=self.make_norm(),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
