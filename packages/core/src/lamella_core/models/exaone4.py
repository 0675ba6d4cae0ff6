"""EXAONE 4 (LG AI Research 2025): norms after each block; full layers among windowed ones do not rotate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import FULL, SLIDING, ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import PostNormDecoderLayer
from lamella_core.layers.head_norm import HeadRMSNorm
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import (
    attention_rules,
    gated_mlp_rules,
    head_norm_rules,
    post_norm_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Exaone4Config(ModelConfig):
    """No fields of its own; without a ``sliding_window`` all layers see all tokens and rotate."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("exaone4",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        window = hf.integer("sliding_window", default=4096, nullable=True)
        types = hf.layer_types(_layer_types(hf, common["num_hidden_layers"], window is not None))
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": window,
            "layer_types": types,
        }


def _layer_types(hf: HfConfig, layers: int, has_window: bool) -> list[str]:
    """Returns the kinds of layers by ``sliding_window_pattern``: a period, or its letters, L for windowed layers."""
    pattern = hf.get("sliding_window_pattern", default=4)
    if not has_window:
        return [FULL] * layers
    if isinstance(pattern, str) and pattern:
        return [SLIDING if pattern[i % len(pattern)] == "L" and i < layers - 1 else FULL for i in range(layers)]
    period = hf.integer("sliding_window_pattern", default=4)
    return [SLIDING if (i + 1) % period else FULL for i in range(layers)]


@register("Exaone4ForCausalLM")
class Exaone4ForCausalLM(CausalLM):
    """Post-norm decoder: windowed rotary or full attention of normed heads, gated MLP, RMSNorm after each."""

    config: Exaone4Config
    config_class = Exaone4Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *post_norm_rules(),
        *attention_rules(),
        *head_norm_rules(),
        *gated_mlp_rules(),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        window = config.layer_window(index)
        return PostNormDecoderLayer(
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                sliding_window=window,
                q_norm=HeadRMSNorm(config),
                k_norm=HeadRMSNorm(config),
                use_rope=config.sliding_window is None or window is not None,
            ),
            attention_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
            mlp_norm=self.make_norm(),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
