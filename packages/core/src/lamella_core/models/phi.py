"""Phi 1, 1.5 and 2 (Gunasekar et al. 2023): attention and MLP side by side after one LayerNorm, biases everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import ParallelDecoderLayer
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import attention_rules, norm_bias_rules, norm_rules, plain_mlp_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class PhiConfig(ModelConfig):
    """No fields of its own."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("phi",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        hf.require("qk_layernorm", (False, None), False)
        return {
            **common,
            "hidden_act": hf.activation("hidden_act", default="gelu_new"),
            "norm_eps": hf.get("layer_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], default_partial=0.5),
            "lm_head_bias": True,
        }


@register("PhiForCausalLM")
class PhiForCausalLM(CausalLM):
    """Parallel blocks: LayerNorm, attention with partly rotary heads beside a plain MLP; a biased output layer."""

    config: PhiConfig
    config_class = PhiConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        WeightRule("model.embed_tokens.weight", "embed_tokens.weight"),
        *(WeightRule(f"model.final_layernorm.{leaf}", f"norm.{leaf}") for leaf in ("weight", "bias")),
        *(WeightRule(f"lm_head.{leaf}", f"lm_head.{leaf}") for leaf in ("weight", "bias")),
        *norm_rules(),
        *norm_bias_rules(),
        *attention_rules(out="dense"),
        *plain_mlp_rules("fc1", "fc2"),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return ParallelDecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=True, out_bias=True),
            mlp=MLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
