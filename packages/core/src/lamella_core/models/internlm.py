"""InternLM 1 (InternLM team 2023): Llama's shape with biased attention projections and dynamic NTK positions."""

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
from lamella_core.rope_config import RopeConfig


@dataclass(frozen=True, kw_only=True)
class InternLMConfig(ModelConfig):
    """InternLM's own fields."""

    bias: bool = True  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("internlm",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": _rope(hf, common["head_dim"]),
            "bias": hf.flag("bias", default=True),
        }


def _rope(hf: HfConfig, head_dim: int) -> RopeConfig:
    rotary = hf.get("rotary", default=None) or {}
    kind = rotary.get("type", "origin") if isinstance(rotary, dict) else None
    if kind not in ("origin", "dynamic"):
        raise ConfigError(
            f'{hf.where}: rotary is {rotary!r}; it must be an object such as {{"type": "dynamic", "base": 10000}}, '
            "of type origin or dynamic"
        )
    scaling = {"factor": rotary.get("scaling_factor", 1.0)} if kind == "dynamic" else {}
    rope_type = "dynamic" if scaling else "default"
    return RopeConfig(rotary_dim=head_dim, theta=rotary.get("base", 10000), rope_type=rope_type, scaling=scaling)


@register("InternLMForCausalLM")
class InternLMForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, multi-head attention with rotary positions, gated MLP."""

    config: InternLMConfig
    config_class = InternLMConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *gated_mlp_rules())

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
