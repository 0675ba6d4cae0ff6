"""StableLM 2 and StableLM 3B (Bellagente et al. 2024): LayerNorm, a quarter of each head rotates, gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer, ParallelDecoderLayer
from lamella_core.layers.head_norm import HeadLayerNorm
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import (
    attention_rules,
    gated_mlp_rules,
    norm_bias_rules,
    norm_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class StableLmConfig(ModelConfig):
    """StableLM's own fields."""

    use_qkv_bias: bool = False
    qk_layernorm: bool = False  # each head of queries and keys, with a weight of its own
    use_parallel_residual: bool = False

    hf_model_types: ClassVar[tuple[str, ...]] = ("stablelm",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("layer_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], default_partial=0.25),
            "use_qkv_bias": hf.flag("use_qkv_bias", default=False),
            "qk_layernorm": hf.flag("qk_layernorm", default=False),
            "use_parallel_residual": hf.flag("use_parallel_residual", default=False),
        }


def _head_norm_rules() -> list[WeightRule]:
    """One tensor per head."""
    return [
        WeightRule(
            f"model.layers.{{i}}.self_attn.{s}_layernorm.norms.{{e}}.weight", f"layers.{{i}}.attention.{s}_norm.weight"
        )
        for s in ("q", "k")
    ]


@register("StableLmForCausalLM")
class StableLmForCausalLM(CausalLM):
    """Pre-norm or parallel blocks: LayerNorm, attention with partly rotary heads, gated MLP."""

    config: StableLmConfig
    config_class = StableLmConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *norm_rules(),
        *norm_bias_rules(),
        *attention_rules(),
        *_head_norm_rules(),
        *gated_mlp_rules(),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        norms = config.qk_layernorm
        attention = Attention(
            config,
            index,
            name=f"{name}.attention",
            qkv_bias=config.use_qkv_bias,
            q_norm=HeadLayerNorm(config, config.num_attention_heads) if norms else None,
            k_norm=HeadLayerNorm(config, config.num_key_value_heads) if norms else None,
        )
        mlp = GatedMLP(config, name=f"{name}.mlp")
        if config.use_parallel_residual:
            return ParallelDecoderLayer(input_norm=self.make_norm(), attention=attention, mlp=mlp)
        return DecoderLayer(input_norm=self.make_norm(), attention=attention, mlp_norm=self.make_norm(), mlp=mlp)

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
