"""Qwen3-MoE (Yang et al. 2025): many small experts, queries and keys normed by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.head_norm import HeadRMSNorm
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.moe import MoE
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._moe import SparseConfig
from lamella_core.models._rules import (
    attention_rules,
    expert_rules,
    gated_mlp_rules,
    head_norm_rules,
    norm_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(SparseConfig):
    """Qwen3-MoE's own fields; ``sliding_window`` holds for all layers."""

    attention_bias: bool = False  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("qwen3_moe",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        window = hf.integer("sliding_window", default=4096, nullable=True)
        return {
            **common,
            **cls.sparse_fields(hf, common["num_hidden_layers"]),
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": window if hf.flag("use_sliding_window", default=False) else None,
            "attention_bias": hf.flag("attention_bias", default=False),
        }


@register("Qwen3MoeForCausalLM")
class Qwen3MoeForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention with normed heads, experts or a gated MLP."""

    config: Qwen3MoeConfig
    config_class = Qwen3MoeConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *norm_rules(),
        *attention_rules(),
        *head_norm_rules(),
        *gated_mlp_rules(),
        *expert_rules(),
    )

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
                sliding_window=config.sliding_window,
                q_norm=HeadRMSNorm(config),
                k_norm=HeadRMSNorm(config),
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp") if index in config.dense_layers else self.make_experts(name),
        )

    def make_experts(self, layer: str) -> MoE:
        config = self.config
        return MoE(
            config,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            inner=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            name=f"{layer}.mlp",
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
