"""Nemotron-H (NVIDIA 2025) and Nemotron Nano 2: layers of one norm each and Mamba-2, attention or a feed-forward.

* Attention has no positions; the feed-forward is a plain MLP of squared ReLU.
* Layers with experts (Nemotron 3 Nano) are not supported.
* Bounds of a step's length (time_step_limit) hold for every token, generated ones too.

Shape legend: T tokens, H hidden size; Mamba-2 has mamba_heads * mamba_head_dim channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import FeedForwardLayer, MixerLayer
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.layers.state_space import Mamba2Mixer, Mamba2Sizes
from lamella_core.models._rules import module_rules
from lamella_core.models._state_space import backbone_rules, mixer_rules, time_step_limit
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

MAMBA, ATTENTION, MLP_LAYER = "linear_attention", "full_attention", "mlp"  # kinds of layers, as transformers calls them
_KINDS = {"M": MAMBA, "*": ATTENTION, "-": MLP_LAYER, "mamba": MAMBA, "attention": ATTENTION}
_MIXER = "backbone.layers.{i}.mixer"


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig(ModelConfig):
    """Nemotron-H's own fields."""

    block_types: tuple[str, ...]  # MAMBA, ATTENTION or MLP_LAYER for each layer
    mamba_heads: int
    mamba_head_dim: int
    mamba_groups: int  # of heads that share b and c
    state_size: int
    conv_kernel: int = 4
    use_bias: bool = False  # of the mixers' projections in and out
    use_conv_bias: bool = True
    mlp_bias: bool = False
    dt_min: float = 0.0  # bounds of a step's length
    dt_max: float | None = None  # None: no bound

    hf_model_types: ClassVar[tuple[str, ...]] = ("nemotron_h",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.block_types) != self.num_hidden_layers or MAMBA not in self.block_types:
            raise ConfigError(
                f"block_types is {self.block_types}; it needs a kind for each of the {self.num_hidden_layers} layers, "
                f"{MAMBA} among them"
            )

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        kinds = _block_types(hf)
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        hf.require("mamba_hidden_act", ("silu", "swish"), "silu")
        hf.require("attention_bias", (False,), False)
        hf.get("num_hidden_layers", default=None)
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": len(kinds),
            "num_attention_heads": heads,
            "num_key_value_heads": hf.integer("num_key_value_heads", default=heads),
            "head_dim": hf.integer("head_dim", "attention_head_dim", default=128),
            "intermediate_size": hf.integer("intermediate_size"),
            "max_position_embeddings": hf.integer("max_position_embeddings", default=4096),
            "hidden_act": hf.activation("mlp_hidden_act", default="relu2"),
            "norm_eps": hf.get("layer_norm_epsilon", "rms_norm_eps", default=1e-5),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=False),
            **hf.token_ids(),
            **time_step_limit(hf),
            "block_types": kinds,
            "mamba_heads": hf.integer("mamba_num_heads", default=128),
            "mamba_head_dim": hf.integer("mamba_head_dim", default=64),
            "mamba_groups": hf.integer("n_groups", "mamba_n_groups", default=8),
            "state_size": hf.integer("ssm_state_size", default=128),
            "conv_kernel": hf.integer("conv_kernel", "mamba_d_conv", default=4),
            "use_bias": hf.flag("use_bias", default=False),
            "use_conv_bias": hf.flag("use_conv_bias", default=True),
            "mlp_bias": hf.flag("mlp_bias", default=False),
        }


def _block_types(hf: HfConfig) -> list[str]:
    """Returns the kind of each layer, from a list or from a pattern such as "M-M*".

    Raises:
        ConfigError: a kind that is not supported.
    """
    given = hf.get("layers_block_type", "layer_types", default=None) or hf.get("hybrid_override_pattern", default=None)
    if not isinstance(given, (str, list)):
        raise ConfigError(f"{hf.where}: layers_block_type is {given!r}; it must be a list, or the pattern text")
    kinds = [_KINDS.get(kind, kind) if isinstance(kind, str) else str(kind) for kind in given]
    for kind in kinds:
        if kind not in _KINDS.values():
            raise ConfigError(
                f"{hf.where}: a layer is of kind {kind!r}; {hf.architecture} supports {MAMBA} (M), {ATTENTION} (*) and "
                f"{MLP_LAYER} (-)"
            )
    return kinds


@register("NemotronHForCausalLM")
class NemotronHForCausalLM(CausalLM):
    """Pre-norm layers, each of which does one thing."""

    config: NemotronHConfig
    config_class = NemotronHConfig
    has_states = True
    SOURCE_PREFIX = "backbone."
    IGNORED = ("mtp.*",)
    WEIGHTS = (
        *backbone_rules(),
        *mixer_rules(),
        *(WeightRule(f"{_MIXER}.{s}_proj.weight", "layers.{i}.mixer.qkv_proj.weight", section=s) for s in "qkv"),
        WeightRule(f"{_MIXER}.o_proj.weight", "layers.{i}.mixer.o_proj.weight"),
        *module_rules({"up_proj": "up_proj", "down_proj": "down_proj"}, f"{_MIXER}.", "layers.{i}.mlp."),
    )

    def weight_rules(self, source_names: Collection[str]) -> list[WeightRule]:
        """Returns the rules; transformers holds what the published files call "backbone." as "model."."""
        if not any(name.startswith("model.") for name in source_names):
            return super().weight_rules(source_names)
        rules = super().weight_rules([name.replace("model.", "backbone.", 1) for name in source_names])
        return [dataclasses.replace(rule, source=rule.source.replace("backbone.", "model.", 1)) for rule in rules]

    def make_layer(self, index: int) -> nn.Module:
        config, kind, name = self.config, self.config.block_types[index], f"layers.{index}.mixer"
        if kind == MLP_LAYER:
            return FeedForwardLayer(
                norm=self.make_norm(), mlp=MLP(config, name=f"layers.{index}.mlp", bias=config.mlp_bias)
            )
        if kind == ATTENTION:
            return MixerLayer(norm=self.make_norm(), mixer=Attention(config, index, name=name))
        sizes = Mamba2Sizes(
            heads=config.mamba_heads,
            head_dim=config.mamba_head_dim,
            groups=config.mamba_groups,
            state_size=config.state_size,
            conv_width=config.conv_kernel,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
        )
        mixer = Mamba2Mixer(config, index, sizes, name=name, bias=config.use_bias, conv_bias=config.use_conv_bias)
        return MixerLayer(norm=self.make_norm(), mixer=mixer)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
