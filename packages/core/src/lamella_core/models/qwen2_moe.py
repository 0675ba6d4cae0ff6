"""Qwen1.5-MoE and Qwen2-MoE (Yang et al. 2024): Qwen2's attention, small experts and a shared one with its own gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import FeedForward, GatedMLP
from lamella_core.layers.moe import MoE, SharedExpert
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._moe import SparseConfig
from lamella_core.models._rules import (
    attention_rules,
    expert_rules,
    gated_mlp_rules,
    norm_rules,
    shared_expert_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(SparseConfig):
    """Qwen2-MoE's own fields; ``intermediate_size`` is that of the layers without experts."""

    shared_expert_intermediate_size: int
    qkv_bias: bool = True
    sliding_layers: tuple[int, ...] = ()  # those that see ``sliding_window`` tokens

    hf_model_types: ClassVar[tuple[str, ...]] = ("qwen2_moe",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_layers and self.sliding_window is None:
            raise ConfigError("layer_types has sliding layers, but use_sliding_window is off or sliding_window null")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        window = hf.integer("sliding_window", default=4096, least=0, nullable=True)
        window = (window or None) if hf.flag("use_sliding_window", default=False) else None
        last = hf.integer("max_window_layers", default=28, least=0)  # every other layer below this one is windowed
        types = hf.get("layer_types", default=None)
        if types is None:
            types = [SLIDING if window and i % 2 == 0 and i < last else "" for i in range(common["num_hidden_layers"])]
        return {
            **common,
            **cls.sparse_fields(hf, common["num_hidden_layers"]),
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": window,
            "sliding_layers": [index for index, kind in enumerate(types) if kind == SLIDING],
            "qkv_bias": hf.flag("qkv_bias", default=True),
            "shared_expert_intermediate_size": hf.integer("shared_expert_intermediate_size", default=5632),
        }


@register("Qwen2MoeForCausalLM")
class Qwen2MoeForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention, experts beside a gated shared one or a gated MLP."""

    config: Qwen2MoeConfig
    config_class = Qwen2MoeConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *norm_rules(),
        *attention_rules(),
        *gated_mlp_rules(),
        *expert_rules(),
        *shared_expert_rules(),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=config.qkv_bias,
                sliding_window=config.sliding_window if index in config.sliding_layers else None,
            ),
            mlp_norm=self.make_norm(),
            mlp=self.make_mlp(index, f"{name}.mlp"),
        )

    def make_mlp(self, index: int, name: str) -> FeedForward:
        config = self.config
        if index in config.dense_layers:
            return GatedMLP(config, name=name)
        inner = config.shared_expert_intermediate_size
        return MoE(
            config,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            inner=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            shared=SharedExpert(config, inner=inner, name=f"{name}.shared", is_gated=True),
            name=name,
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
