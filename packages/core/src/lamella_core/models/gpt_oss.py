"""GPT-OSS (OpenAI 2025): windows in every other layer, a sink in each softmax, biased experts with a clamped gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import FULL, SLIDING, ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.activation import ClampedSwiglu
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.moe import MoE, TopKRouter
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

_LAYER, _EXPERTS = "model.layers.{i}", "layers.{i}.mlp.experts"


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(ModelConfig):
    """GPT-OSS's own fields; ``intermediate_size`` is that of one expert."""

    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    attention_bias: bool = True  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("gpt_oss",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        layers = common["num_hidden_layers"]
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], default_theta=150000.0),
            "sliding_window": hf.integer("sliding_window", default=128),
            "layer_types": hf.layer_types([FULL if i % 2 else SLIDING for i in range(layers)]),
            "num_local_experts": hf.integer("num_local_experts", "num_experts", default=128),
            "num_experts_per_tok": hf.integer("num_experts_per_tok", "experts_per_token", default=4),
            "swiglu_alpha": hf.number("swiglu_alpha", default=1.702),
            "swiglu_limit": hf.number("swiglu_limit", default=7.0),
            "attention_bias": hf.flag("attention_bias", default=True),
        }


def _expert_rules() -> list[WeightRule]:
    """Weights of all experts in one tensor, [in, out] or packed [out, in]; outputs of gate and up take turns."""
    source = f"{_LAYER}.mlp.experts"
    rules = []
    for name, turns in (("gate_up_proj", True), ("down_proj", False)):
        weight, bias = f"{_EXPERTS}.{name}.weight", f"{_EXPERTS}.{name}.bias"
        rules += [
            WeightRule(f"{source}.{name}", weight, transpose=True, interleaved=turns),
            WeightRule(f"{source}.{name}_blocks", weight, interleaved=turns),
            WeightRule(f"{source}.{name}_bias", bias, interleaved=turns),
        ]
    return rules


@register("GptOssForCausalLM")
class GptOssForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, rotary grouped-query attention with sinks, mixture of clamped experts."""

    config: GptOssConfig
    config_class = GptOssConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *norm_rules(),
        *attention_rules(),
        WeightRule(f"{_LAYER}.self_attn.sinks", "layers.{i}.attention.sinks"),
        *(WeightRule(f"{_LAYER}.mlp.router.{s}", f"layers.{{i}}.mlp.router.gate.{s}") for s in ("weight", "bias")),
        *_expert_rules(),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        experts, top_k, bias = config.num_local_experts, config.num_experts_per_tok, config.attention_bias
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=bias,
                out_bias=bias,
                sliding_window=config.layer_window(index),
                has_sinks=True,
            ),
            mlp_norm=self.make_norm(),
            mlp=MoE(
                config,
                num_experts=experts,
                top_k=top_k,
                inner=config.intermediate_size,
                name=f"{name}.mlp",
                router=TopKRouter(config, experts, top_k, name=f"{name}.mlp.router", bias=True),
                bias=True,
                activation=ClampedSwiglu(config.swiglu_alpha, config.swiglu_limit),
            ),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
