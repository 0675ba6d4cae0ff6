"""Cohere Command R7B and Command A (2025): Command R with windowed layers; full ones see no positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import FULL, SLIDING, ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import ParallelDecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import attention_rules, gated_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Cohere2Config(ModelConfig):
    """Cohere's own fields."""

    attention_bias: bool = False  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("cohere2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; neighbouring elements rotate in pairs."""
        common = hf.decoder_fields()
        period = hf.integer("sliding_window_pattern", default=4)
        types = [SLIDING if (i + 1) % period else FULL for i in range(common["num_hidden_layers"])]
        return {
            **common,
            "norm_eps": hf.get("layer_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], interleaved=True),
            "sliding_window": hf.integer("sliding_window", default=4096, nullable=True),
            "layer_types": hf.layer_types(types),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "attention_bias": hf.flag("attention_bias", default=False),
            "logit_scale": hf.number("logit_scale", default=0.0625),
        }


@register("Cohere2ForCausalLM")
class Cohere2ForCausalLM(CausalLM):
    """Parallel blocks: LayerNorm, windowed rotary or full attention beside a gated MLP."""

    config: Cohere2Config
    config_class = Cohere2Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *gated_mlp_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        window = config.layer_window(index)
        return ParallelDecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                sliding_window=window,
                use_rope=window is not None,
            ),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype, bias=False)
