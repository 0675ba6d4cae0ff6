"""SmolLM3 (Bakouch et al. 2025): Llama's shape; every fourth layer sees no positions (Yang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import FULL, SLIDING, ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, gated_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(ModelConfig):
    """SmolLM3's own fields."""

    no_rope_layers: tuple[int, ...]  # 1 for each layer that rotates, 0 for the others (so they are called)
    attention_bias: bool = False  # of the query, key, value and output projections
    mlp_bias: bool = False

    hf_model_types: ClassVar[tuple[str, ...]] = ("smollm3",)

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.num_hidden_layers
        if len(self.no_rope_layers) != layers or not all(value in (0, 1) for value in self.no_rope_layers):
            raise ConfigError(f"no_rope_layers is {self.no_rope_layers}; it needs 0 or 1 for each of {layers} layers")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        interval = hf.integer("no_rope_layer_interval", default=4)
        rotates = hf.get("no_rope_layers", default=None)
        if rotates is not None and not isinstance(rotates, list):
            raise ConfigError(f"{hf.where}: no_rope_layers is {rotates!r}; it must be a list")
        if rotates is None:
            rotates = [int((i + 1) % interval != 0) for i in range(common["num_hidden_layers"])]
        window = hf.integer("sliding_window", default=None, nullable=True)
        window = window if hf.flag("use_sliding_window", default=False) else None
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": window,
            "layer_types": hf.layer_types([FULL if rotating else SLIDING for rotating in rotates] if window else ()),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "no_rope_layers": rotates,
            "attention_bias": hf.flag("attention_bias", default=False),
            "mlp_bias": hf.flag("mlp_bias", default=False),
        }


@register("SmolLM3ForCausalLM")
class SmolLM3ForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention with rotary positions in some layers, gated MLP."""

    config: SmolLM3Config
    config_class = SmolLM3Config
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
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                sliding_window=config.layer_window(index),
                use_rope=bool(config.no_rope_layers[index]),
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp", bias=config.mlp_bias),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
