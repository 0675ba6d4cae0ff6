"""Mamba-2 (Dao and Gu 2024): layers of one norm and one state space each, whose heads decay as a whole.

* Works on transformers' files and on the authors' own (config.json of mamba_ssm, without architectures).
* What the residual stream adds up has the model's dtype, also where config.json says residual_in_fp32.
* Bounds of a step's length (time_step_limit) hold for every token, generated ones too.

Shape legend: T tokens, H hidden size; heads * head_dim = expand * H channels in n_groups groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.decoder import MixerLayer
from lamella_core.layers.norm import RMSNorm
from lamella_core.layers.state_space import Mamba2Mixer, Mamba2Sizes
from lamella_core.models._state_space import backbone_rules, mixer_rules, pure_fields, time_step_limit
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(ModelConfig):
    """Mamba-2's own fields; attention heads are its heads, key/value heads its groups, which share b and c."""

    state_size: int
    conv_kernel: int = 4
    use_bias: bool = False  # of the projections in and out
    use_conv_bias: bool = True
    dt_min: float = 0.0  # bounds of a step's length
    dt_max: float | None = None  # None: no bound

    hf_model_types: ClassVar[tuple[str, ...]] = ("mamba2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config, or one of mamba_ssm."""
        common, inner = pure_fields(hf), hf.nested("ssm_cfg")
        is_original = hf.get("ssm_cfg", default=None) is not None
        inner.require("layer", ("Mamba2",), "Mamba2")
        inner.require("D_has_hdim", (False,), False)
        inner.require("norm_before_gate", (False,), False)
        inner.require("rmsnorm", (True,), True)
        hidden = common["hidden_size"]
        channels = inner.integer("expand", default=hf.integer("expand", default=2)) * hidden
        inner.require("d_ssm", (channels, None), None)
        head_dim = inner.integer("headdim", default=hf.integer("head_dim", default=64))
        heads = hf.integer("num_heads", default=channels // head_dim)
        if heads * head_dim != channels:
            raise ConfigError(f"{hf.where}: num_heads {heads} * head_dim {head_dim} is not expand * hidden_size")
        groups = inner.integer("ngroups", default=1 if is_original else hf.integer("n_groups", default=8))
        limit = inner if inner.get("dt_limit", default=None) is not None else hf
        return {
            **common,
            **time_step_limit(limit),
            "intermediate_size": channels,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": head_dim,
            "state_size": inner.integer("d_state", default=hf.integer("state_size", default=128)),
            "conv_kernel": inner.integer("d_conv", default=hf.integer("conv_kernel", default=4)),
            "use_bias": inner.flag("bias", default=hf.flag("use_bias", default=False)),
            "use_conv_bias": inner.flag("conv_bias", default=hf.flag("use_conv_bias", default=True)),
            "tie_word_embeddings": hf.flag(
                "tie_word_embeddings", default=hf.flag("tie_embeddings", default=is_original)
            ),
        }


@register("Mamba2ForCausalLM")
class Mamba2ForCausalLM(CausalLM):
    """A stack of norm and mixer."""

    config: Mamba2Config
    config_class = Mamba2Config
    SOURCE_PREFIX = "backbone."
    has_states = True
    WEIGHTS = (*backbone_rules(), *mixer_rules())

    def make_layer(self, index: int) -> nn.Module:
        config = self.config
        sizes = Mamba2Sizes(
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            groups=config.num_key_value_heads,
            state_size=config.state_size,
            conv_width=config.conv_kernel,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
        )
        mixer = Mamba2Mixer(
            config,
            index,
            sizes,
            name=f"layers.{index}.mixer",
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
        )
        return MixerLayer(norm=self.make_norm(), mixer=mixer)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
