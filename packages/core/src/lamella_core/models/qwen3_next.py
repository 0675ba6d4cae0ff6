"""Qwen3-Next (Qwen team 2025): three layers of gated DeltaNet for each of attention, and many small experts.

* Attention: heads normed by 1 + weight, a quarter of a head rotates, results pass a sigmoid gate of their own.
* All norms but those of the DeltaNet layers multiply by 1 + weight.
* Layers that guess further tokens (multi-token prediction) are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.checks import check_integer
from lamella_core.config import FULL
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.delta_net import DeltaNetSizes, GatedDeltaNet
from lamella_core.layers.head_norm import HeadRMSNorm
from lamella_core.layers.mixer import TokenMixer
from lamella_core.layers.mlp import FeedForward, GatedMLP
from lamella_core.layers.moe import MoE, SharedExpert
from lamella_core.layers.norm import UnitOffsetRMSNorm
from lamella_core.models._moe import SparseConfig
from lamella_core.models._rules import (
    attention_rules,
    expert_rules,
    gated_mlp_rules,
    head_norm_rules,
    norm_rules,
    shared_expert_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

LINEAR = "linear_attention"  # a kind of layers, as Hugging Face configs call it


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(SparseConfig):
    """Qwen3-Next's own fields; ``intermediate_size`` is that of the layers without experts."""

    attention_layers: tuple[int, ...]  # the others are gated DeltaNet
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    conv_kernel: int = 4
    shared_expert_intermediate_size: int
    attention_bias: bool = False  # of the query, key, value and output projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("qwen3_next",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in self.attention_layers:
            check_integer("an entry of attention_layers", layer, 0, self.num_hidden_layers - 1)
        if len(set(self.attention_layers)) == self.num_hidden_layers:
            raise ConfigError(f"every layer is {FULL}; Qwen3-Next has {LINEAR} too")
        if self.linear_value_heads % self.linear_key_heads:
            raise ConfigError(
                f"linear_num_value_heads {self.linear_value_heads} is not a multiple of linear_num_key_heads "
                f"{self.linear_key_heads}; correct one of them"
            )

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        hf.require("hidden_act", ("silu", "swish"), "silu")
        layers, step = common["num_hidden_layers"], hf.integer("full_attention_interval", default=4)
        kinds = hf.layer_types([LINEAR if (index + 1) % step else FULL for index in range(layers)])
        if len(kinds) != layers or any(kind not in (LINEAR, FULL) for kind in kinds):
            raise ConfigError(f"{hf.where}: layer_types is {kinds}; it needs {LINEAR} or {FULL} for each layer")
        return {
            **common,
            **cls.sparse_fields(hf, layers),
            "norm_topk_prob": hf.flag("norm_topk_prob", default=True),
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(common["head_dim"], default_partial=0.25),
            "attention_layers": [index for index, kind in enumerate(kinds) if kind == FULL],
            "linear_key_heads": hf.integer("linear_num_key_heads", default=16),
            "linear_value_heads": hf.integer("linear_num_value_heads", default=32),
            "linear_key_dim": hf.integer("linear_key_head_dim", default=128),
            "linear_value_dim": hf.integer("linear_value_head_dim", default=128),
            "conv_kernel": hf.integer("linear_conv_kernel_dim", default=4),
            "shared_expert_intermediate_size": hf.integer("shared_expert_intermediate_size", default=512),
            "attention_bias": hf.flag("attention_bias", default=False),
        }


def _mixer_rules() -> list[WeightRule]:
    """Both mixers; where one tensor holds several projections, it does so head by head, or key head by key head."""
    attention, linear, target = "model.layers.{i}.self_attn", "model.layers.{i}.linear_attn", "layers.{i}.attention"
    interleaved = [
        (f"{attention}.q_proj.weight", f"{target}.qkv_proj.weight", ("q", "gate")),
        (f"{attention}.q_proj.bias", f"{target}.qkv_proj.bias", ("q", "gate")),
        (f"{linear}.in_proj_qkvz.weight", f"{target}.in_proj.weight", ("q", "k", "v", "z")),
        (f"{linear}.in_proj_ba.weight", f"{target}.ba_proj.weight", ("b", "a")),
    ]
    same = {"conv1d.weight": "conv.weight", "A_log": "a_log", "dt_bias": "dt_bias", "norm.weight": "norm.weight",
            "out_proj.weight": "out_proj.weight"}  # fmt: skip
    return [
        *(WeightRule(old, new, section=parts, interleaved=True) for old, new, parts in interleaved),
        *(rule for rule in attention_rules() if rule.section != "q"),
        *(WeightRule(f"{linear}.{old}", f"{target}.{new}") for old, new in same.items()),
    ]


@register("Qwen3NextForCausalLM")
class Qwen3NextForCausalLM(CausalLM):
    """Pre-norm decoder: gated DeltaNet or gated attention, then experts beside a gated shared one, or a gated MLP."""

    config: Qwen3NextConfig
    config_class = Qwen3NextConfig
    has_states = True
    IGNORED = ("mtp.*", "*.rotary_emb.inv_freq")
    WEIGHTS = (
        *vocabulary_rules(),
        *norm_rules(),
        *_mixer_rules(),
        *head_norm_rules(),
        *gated_mlp_rules(),
        *expert_rules(),
        *shared_expert_rules(),
    )

    def make_layer(self, index: int) -> nn.Module:
        name = f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=self._mixer(index, f"{name}.attention"),
            mlp_norm=self.make_norm(),
            mlp=self._feed_forward(index, f"{name}.mlp"),
        )

    def _mixer(self, index: int, name: str) -> TokenMixer:
        config = self.config
        if index in config.attention_layers:
            return Attention(
                config,
                index,
                name=name,
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                q_norm=HeadRMSNorm(config, unit_offset=True),
                k_norm=HeadRMSNorm(config, unit_offset=True),
                has_gate=True,
            )
        sizes = DeltaNetSizes(
            key_heads=config.linear_key_heads,
            value_heads=config.linear_value_heads,
            key_dim=config.linear_key_dim,
            value_dim=config.linear_value_dim,
            conv_width=config.conv_kernel,
        )
        return GatedDeltaNet(config, index, sizes, name=name)

    def _feed_forward(self, index: int, name: str) -> FeedForward:
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

    def make_norm(self) -> UnitOffsetRMSNorm:
        return UnitOffsetRMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
