"""Bamba (IBM, Princeton and UIUC 2024): Mamba-2 layers and, few of them, attention with partly rotary heads.

Shape legend: T tokens, H hidden size; Mamba-2 has mamba_heads * mamba_head_dim = expand * H channels.
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
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.layers.state_space import Mamba2Mixer, Mamba2Sizes
from lamella_core.models._rules import attention_rules, gated_mlp_rules
from lamella_core.models._state_space import mixer_rules, time_step_limit
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

_LAYER = "model.layers.{i}"


@dataclass(frozen=True, kw_only=True)
class BambaConfig(ModelConfig):
    """Bamba's own fields."""

    attention_layers: tuple[int, ...]  # the others are Mamba-2
    mamba_heads: int
    mamba_head_dim: int
    mamba_groups: int  # of heads that share b and c
    state_size: int
    conv_kernel: int = 4
    use_bias: bool = False  # of the mixers' projections in and out
    use_conv_bias: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    dt_min: float = 0.0  # bounds of a step's length
    dt_max: float | None = None  # None: no bound

    hf_model_types: ClassVar[tuple[str, ...]] = ("bamba",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in self.attention_layers:
            check_integer("an entry of attn_layer_indices", layer, 0, self.num_hidden_layers - 1)
        if len(set(self.attention_layers)) == self.num_hidden_layers:
            raise ConfigError("attn_layer_indices names every layer; Bamba has Mamba-2 layers too")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        hf.require("hidden_act", ("silu", "swish"), "silu")
        channels = hf.integer("mamba_expand", default=2) * common["hidden_size"]
        heads = hf.integer("mamba_n_heads", default=128)
        head_dim = hf.get("mamba_d_head", default="auto")
        head_dim = channels // heads if head_dim == "auto" else head_dim
        if heads * head_dim != channels:
            raise ConfigError(
                f"{hf.where}: mamba_n_heads {heads} * mamba_d_head {head_dim} is not mamba_expand * hidden_size"
            )
        layers = hf.get("attn_layer_indices", default=None) or []
        if not isinstance(layers, list):
            raise ConfigError(f"{hf.where}: attn_layer_indices is {layers!r}; it must be a list of layer numbers")
        return {
            **common,
            **time_step_limit(hf),
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], default_partial=0.5),
            "attention_layers": layers,
            "mamba_heads": heads,
            "mamba_head_dim": head_dim,
            "mamba_groups": hf.integer("mamba_n_groups", default=1),
            "state_size": hf.integer("mamba_d_state", default=256),
            "conv_kernel": hf.integer("mamba_d_conv", default=4),
            "use_bias": hf.flag("mamba_proj_bias", default=False),
            "use_conv_bias": hf.flag("mamba_conv_bias", default=True),
            "attention_bias": hf.flag("attention_bias", default=False),
            "mlp_bias": hf.flag("mlp_bias", default=False),
        }


@register("BambaForCausalLM")
class BambaForCausalLM(CausalLM):
    """Pre-norm decoder: Mamba-2 or grouped-query attention, then a gated MLP."""

    config: BambaConfig
    config_class = BambaConfig
    has_states = True
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        WeightRule("model.embed_tokens.weight", "embed_tokens.weight"),
        WeightRule("model.final_layernorm.weight", "norm.weight"),
        WeightRule("lm_head.weight", "lm_head.weight"),
        WeightRule(f"{_LAYER}.input_layernorm.weight", "layers.{i}.input_norm.weight"),
        WeightRule(f"{_LAYER}.pre_ff_layernorm.weight", "layers.{i}.mlp_norm.weight"),
        *mixer_rules(f"{_LAYER}.mamba", "layers.{i}.attention"),
        *attention_rules(),
        *gated_mlp_rules("feed_forward"),
    )

    def make_layer(self, index: int) -> nn.Module:
        config = self.config
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=self._mixer(index),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"layers.{index}.mlp", bias=config.mlp_bias),
        )

    def _mixer(self, index: int) -> TokenMixer:
        config, name = self.config, f"layers.{index}.attention"
        if index in config.attention_layers:
            bias = config.attention_bias
            return Attention(config, index, name=name, qkv_bias=bias, out_bias=bias)
        sizes = Mamba2Sizes(
            heads=config.mamba_heads,
            head_dim=config.mamba_head_dim,
            groups=config.mamba_groups,
            state_size=config.state_size,
            conv_width=config.conv_kernel,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
        )
        return Mamba2Mixer(config, index, sizes, name=name, bias=config.use_bias, conv_bias=config.use_conv_bias)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
