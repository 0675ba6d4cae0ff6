"""InternLM 2 and 2.5 (Cai et al. 2024): Llama's shape; each key/value head is stored with its queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class InternLM2Config(ModelConfig):
    """InternLM 2's own fields."""

    bias: bool = True  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("internlm2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"]),
            "bias": hf.flag("bias", default=True),
        }


def _rules() -> list[WeightRule]:
    source, target, qkv = "model.layers.{i}.", "layers.{i}.", ("q", "k", "v")
    packed = (f"{source}attention.wqkv.", f"{target}attention.qkv_proj.")
    gate_up = f"{target}mlp.gate_up_proj.weight"
    return [
        *(WeightRule(packed[0] + leaf, packed[1] + leaf, qkv, interleaved=True) for leaf in ("weight", "bias")),
        *module_rules({"attention.wo": "attention.o_proj"}, source, target),
        WeightRule(f"{source}feed_forward.w1.weight", gate_up, "gate"),
        WeightRule(f"{source}feed_forward.w3.weight", gate_up, "up"),
        WeightRule(f"{source}feed_forward.w2.weight", f"{target}mlp.down_proj.weight"),
        WeightRule(f"{source}attention_norm.weight", f"{target}input_norm.weight"),
        WeightRule(f"{source}ffn_norm.weight", f"{target}mlp_norm.weight"),
        WeightRule("model.tok_embeddings.weight", "embed_tokens.weight"),
        WeightRule("model.norm.weight", "norm.weight"),
        WeightRule("output.weight", "lm_head.weight"),
    ]


@register("InternLM2ForCausalLM")
class InternLM2ForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, gated MLP."""

    config: InternLM2Config
    config_class = InternLM2Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = tuple(_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=config.bias, out_bias=config.bias),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
