"""Jamba (AI21 Labs 2024): Mamba layers and, few of them, attention without positions; every second one has experts.

Step lengths, b and c of the Mamba layers are normed as they are projected. The weights of a token's experts are their
shares among all experts, not rescaled.

Shape legend: H hidden size; Mamba has mamba_expand * H channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.checks import check_integer
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mixer import TokenMixer
from lamella_core.layers.mlp import FeedForward, GatedMLP
from lamella_core.layers.moe import MoE
from lamella_core.layers.norm import RMSNorm
from lamella_core.layers.state_space import Mamba1Mixer, Mamba1Sizes
from lamella_core.models._rules import attention_rules, expert_rules, gated_mlp_rules
from lamella_core.models._state_space import mixer_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

_LAYER = "model.layers.{i}"


@dataclass(frozen=True, kw_only=True)
class JambaConfig(ModelConfig):
    """``intermediate_size`` is that of the MLPs and of one expert."""

    attention_layers: tuple[int, ...]  # the others are Mamba
    moe_layers: tuple[int, ...]  # the others have a gated MLP
    num_experts: int
    num_experts_per_tok: int
    mamba_channels: int
    state_size: int
    time_step_rank: int
    conv_kernel: int = 4
    use_bias: bool = False  # of the Mamba layers' projections in and out
    use_conv_bias: bool = True

    hf_model_types: ClassVar[tuple[str, ...]] = ("jamba",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attention_layers", "moe_layers"):
            for layer in getattr(self, name):
                check_integer(f"an entry of {name}", layer, 0, self.num_hidden_layers - 1)
        if len(set(self.attention_layers)) == self.num_hidden_layers:
            raise ConfigError("every layer is one of attention_layers; Jamba has Mamba layers too")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        hf.require("hidden_act", ("silu", "swish"), "silu")
        hidden, layers = common["hidden_size"], common["num_hidden_layers"]
        experts = hf.integer("num_experts", "num_local_experts", default=16)
        rank = hf.get("mamba_dt_rank", default="auto")
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "attention_layers": _every(hf, "attn_layer", layers, default=(8, 4)),
            "moe_layers": _every(hf, "expert_layer", layers, default=(2, 1)) if experts > 1 else [],
            "num_experts": experts,
            "num_experts_per_tok": hf.integer("num_experts_per_tok", default=2),
            "mamba_channels": hf.integer("mamba_expand", default=2) * hidden,
            "state_size": hf.integer("mamba_d_state", default=16),
            "time_step_rank": -(-hidden // 16) if rank == "auto" else rank,
            "conv_kernel": hf.integer("mamba_d_conv", default=4),
            "use_bias": hf.flag("mamba_proj_bias", default=False),
            "use_conv_bias": hf.flag("mamba_conv_bias", default=True),
        }


def _every(hf: HfConfig, kind: str, layers: int, default: tuple[int, int]) -> list[int]:
    """Returns the layers of a kind, of which there is one in each period.

    Raises:
        ConfigError: the place in the period is not inside it.
    """
    period = hf.integer(f"{kind}_period", default=default[0])
    offset = hf.integer(f"{kind}_offset", default=default[1], least=0)
    if offset >= period:
        raise ConfigError(f"{hf.where}: {kind}_offset {offset} must be smaller than {kind}_period {period}")
    return list(range(offset, layers, period))


@register("JambaForCausalLM")
class JambaForCausalLM(CausalLM):
    """Pre-norm decoder: Mamba or grouped-query attention, then a gated MLP or experts."""

    config: JambaConfig
    config_class = JambaConfig
    has_states = True
    WEIGHTS = (
        WeightRule("model.embed_tokens.weight", "embed_tokens.weight"),
        WeightRule("model.final_layernorm.weight", "norm.weight"),
        WeightRule("lm_head.weight", "lm_head.weight"),
        WeightRule(f"{_LAYER}.input_layernorm.weight", "layers.{i}.input_norm.weight"),
        WeightRule(f"{_LAYER}.pre_ff_layernorm.weight", "layers.{i}.mlp_norm.weight"),
        *mixer_rules(f"{_LAYER}.mamba", "layers.{i}.attention"),
        *(
            WeightRule(f"{_LAYER}.mamba.{part}_layernorm.weight", f"layers.{{i}}.attention.norms.{part}.weight")
            for part in ("dt", "b", "c")
        ),
        *attention_rules(),
        *gated_mlp_rules("feed_forward"),
        *expert_rules("feed_forward", router="router", held="feed_forward"),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        is_attention = index in config.attention_layers
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention") if is_attention else self._mamba(index),
            mlp_norm=self.make_norm(),
            mlp=self._feed_forward(index, f"{name}.mlp"),
        )

    def _mamba(self, index: int) -> TokenMixer:
        config = self.config
        sizes = Mamba1Sizes(
            channels=config.mamba_channels,
            state_size=config.state_size,
            dt_rank=config.time_step_rank,
            conv_width=config.conv_kernel,
        )
        dt, b, c = (
            RMSNorm(size, config.norm_eps, config.torch_dtype)
            for size in (config.time_step_rank, config.state_size, config.state_size)
        )
        return Mamba1Mixer(
            config,
            index,
            sizes,
            name=f"layers.{index}.attention",
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            norms=(dt, b, c),
        )

    def _feed_forward(self, index: int, name: str) -> FeedForward:
        config = self.config
        if index not in config.moe_layers:
            return GatedMLP(config, name=name)
        return MoE(
            config,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            inner=config.intermediate_size,
            renormalize=False,
            name=name,
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
