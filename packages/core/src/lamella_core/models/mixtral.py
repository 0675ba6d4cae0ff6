"""Mixtral (Jiang et al. 2024): Mistral's shape with a mixture of experts in place of the MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.moe import MoE
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, expert_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(ModelConfig):
    """Mixtral's own fields; ``intermediate_size`` is that of one expert."""

    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    hf_model_types: ClassVar[tuple[str, ...]] = ("mixtral",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], default_theta=1e6),
            "sliding_window": hf.integer("sliding_window", default=None, nullable=True),
            "num_local_experts": hf.integer("num_local_experts", "num_experts", default=8),
            "num_experts_per_tok": hf.integer("num_experts_per_tok", default=2),
        }


@register("MixtralForCausalLM")
class MixtralForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, mixture of gated experts."""

    config: MixtralConfig
    config_class = MixtralConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *norm_rules(),
        *attention_rules(),
        *expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", sliding_window=config.sliding_window),
            mlp_norm=self.make_norm(),
            mlp=MoE(
                config,
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                inner=config.intermediate_size,
                name=f"{name}.mlp",
            ),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
