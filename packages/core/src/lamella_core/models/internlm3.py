"""InternLM 3 (InternLM team 2025): Llama's shape, the biases of queries, keys and values switched by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, gated_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class InternLM3Config(ModelConfig):
    """InternLM 3's own fields."""

    qkv_bias: bool = False  # of the query, key and value projections
    bias: bool = False  # of the other projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("internlm3",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; transformers calls the biases otherwise."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"]),
            "qkv_bias": hf.flag("qkv_bias", default=hf.flag("attention_bias", default=False)),
            "bias": hf.flag("bias", default=hf.flag("mlp_bias", default=False)),
        }


@register("InternLM3ForCausalLM")
class InternLM3ForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, gated MLP."""

    config: InternLM3Config
    config_class = InternLM3Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *gated_mlp_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config, index, name=f"{name}.attention", qkv_bias=config.qkv_bias, out_bias=config.bias
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp", bias=config.bias),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
