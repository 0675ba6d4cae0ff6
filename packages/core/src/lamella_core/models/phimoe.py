"""Phi-3.5-MoE (Abdin et al. 2024): Mixtral's shape with LayerNorm, SparseMixer routing and longrope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.moe import MoE, SparseMixerRouter
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import attention_rules, expert_rules, norm_bias_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class PhimoeConfig(ModelConfig):
    """PhiMoE's own fields; ``intermediate_size`` is that of one expert."""

    num_local_experts: int = 16
    num_experts_per_tok: int = 2
    router_jitter_noise: float = 0.01  # half the relative distance of scores up to which experts are weighed together
    attention_bias: bool = False  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("phimoe",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], default_theta=1e6),
            "sliding_window": hf.integer("sliding_window", default=None, nullable=True),
            "lm_head_bias": hf.flag("lm_head_bias", default=False),
            "num_local_experts": hf.integer("num_local_experts", default=16),
            "num_experts_per_tok": hf.require("num_experts_per_tok", (2,), 2),
            "router_jitter_noise": hf.get("router_jitter_noise", default=0.01),
            "attention_bias": hf.flag("attention_bias", default=False),
        }


@register("PhimoeForCausalLM", "PhiMoEForCausalLM")
class PhimoeForCausalLM(CausalLM):
    """Pre-norm decoder: LayerNorm, grouped-query attention with rotary positions, two experts of many."""

    config: PhimoeConfig
    config_class = PhimoeConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        WeightRule("lm_head.bias", "lm_head.bias"),
        *norm_rules(),
        *norm_bias_rules(),
        *attention_rules(),
        *expert_rules("block_sparse_moe", ("w1", "w3", "w2"), router="router"),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        experts, top_k = config.num_local_experts, config.num_experts_per_tok
        bias, router = config.attention_bias, f"{name}.mlp.router"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=bias,
                out_bias=bias,
                sliding_window=config.sliding_window,
            ),
            mlp_norm=self.make_norm(),
            mlp=MoE(
                config,
                num_experts=experts,
                top_k=top_k,
                inner=config.intermediate_size,
                router=SparseMixerRouter(config, experts, top_k, name=router, jitter=config.router_jitter_noise),
                name=f"{name}.mlp",
            ),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
