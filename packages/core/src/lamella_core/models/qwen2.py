"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's shape with biased queries, keys and values; some layers windowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import FULL, SLIDING, ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, gated_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(ModelConfig):
    """No fields of its own."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("qwen2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        layers = common["num_hidden_layers"]
        window = hf.integer("sliding_window", default=4096, nullable=True)
        window = window if hf.flag("use_sliding_window", default=False) else None
        first = hf.integer("max_window_layers", default=28, least=0)  # layers from this one on are windowed
        types = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": window,
            "layer_types": hf.layer_types(types),
        }


@register("Qwen2ForCausalLM")
class Qwen2ForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention with biased projections, gated MLP."""

    config: Qwen2Config
    config_class = Qwen2Config
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
                qkv_bias=True,
                sliding_window=config.layer_window(index),
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
