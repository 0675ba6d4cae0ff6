"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's shape with biased queries, keys and values; some layers windowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, gated_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(ModelConfig):
    """Qwen2's own fields."""

    layer_types: tuple[str, ...] = ()  # FULL or SLIDING for each layer; sliding ones see ``sliding_window`` tokens

    hf_model_types: ClassVar[tuple[str, ...]] = ("qwen2",)

    def __post_init__(self) -> None:
        super().__post_init__()
        types = self.layer_types
        if len(types) != self.num_hidden_layers or not all(kind in (FULL, SLIDING) for kind in types):
            raise ConfigError(
                f"layer_types is {types}; it needs {FULL} or {SLIDING} for each of the {self.num_hidden_layers} layers"
            )
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise ConfigError("layer_types has sliding layers, but use_sliding_window is off or sliding_window null")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        layers = common["num_hidden_layers"]
        window = hf.integer("sliding_window", default=4096, nullable=True)
        window = window if hf.flag("use_sliding_window", default=False) else None
        first = hf.integer("max_window_layers", default=28, least=0)  # layers from this one on are windowed
        types = hf.get("layer_types", default=None)
        if types is None:
            types = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": window,
            "layer_types": types,
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
                sliding_window=config.sliding_window if config.layer_types[index] == SLIDING else None,
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
