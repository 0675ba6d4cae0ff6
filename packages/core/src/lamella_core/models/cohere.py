"""Cohere Command R (2024): attention and MLP side by side after one LayerNorm without bias, scaled logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import ParallelDecoderLayer
from lamella_core.layers.head_norm import HeadLayerNorm
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import (
    attention_rules,
    gated_mlp_rules,
    head_norm_rules,
    norm_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class CohereConfig(ModelConfig):
    """Cohere's own fields."""

    attention_bias: bool = False  # of the query, key, value and output projections
    use_qk_norm: bool = False  # each head of queries and keys, with a weight of its own

    hf_model_types: ClassVar[tuple[str, ...]] = ("cohere",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; neighbouring elements rotate in pairs."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("layer_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], interleaved=True),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "attention_bias": hf.flag("attention_bias", default=False),
            "use_qk_norm": hf.flag("use_qk_norm", default=False),
            "logit_scale": hf.number("logit_scale", default=0.0625),
        }


@register("CohereForCausalLM")
class CohereForCausalLM(CausalLM):
    """Parallel blocks: LayerNorm, grouped-query attention with rotary positions beside a gated MLP."""

    config: CohereConfig
    config_class = CohereConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *head_norm_rules(), *gated_mlp_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        norms = config.use_qk_norm
        return ParallelDecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                q_norm=HeadLayerNorm(config, config.num_attention_heads) if norms else None,
                k_norm=HeadLayerNorm(config, config.num_key_value_heads) if norms else None,
            ),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype, bias=False)
