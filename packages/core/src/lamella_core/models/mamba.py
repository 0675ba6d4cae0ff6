"""Mamba (Gu and Dao 2023): layers of one norm and one selective state space each; no attention, no positions.

* Works on transformers' files and on the authors' own (config.json of mamba_ssm, without architectures).
* What the residual stream adds up has the model's dtype, also where config.json says residual_in_fp32.

Shape legend: T tokens, H hidden size, C = expand * H channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.decoder import MixerLayer
from lamella_core.layers.norm import Norm, RMSNorm
from lamella_core.layers.state_space import Mamba1Mixer, Mamba1Sizes
from lamella_core.models._state_space import backbone_rules, mixer_rules, pure_fields
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class MambaConfig(ModelConfig):
    """Mamba's own fields; ``intermediate_size`` is the number of channels, each a "head" of its own."""

    state_size: int
    time_step_rank: int
    conv_kernel: int = 4
    use_bias: bool = False  # of the projections in and out
    use_conv_bias: bool = True

    hf_model_types: ClassVar[tuple[str, ...]] = ("mamba",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config, or one of mamba_ssm."""
        common, inner = pure_fields(hf), hf.nested("ssm_cfg")
        inner.require("layer", ("Mamba1",), "Mamba1")
        hidden = common["hidden_size"]
        channels = inner.integer("expand", default=hf.integer("expand", default=2)) * hidden
        rank = inner.get("dt_rank", default=hf.get("time_step_rank", default="auto"))
        return {
            **common,
            "intermediate_size": channels,
            "num_attention_heads": channels,
            "num_key_value_heads": channels,
            "head_dim": 1,
            "state_size": inner.integer("d_state", default=hf.integer("state_size", default=16)),
            "time_step_rank": -(-hidden // 16) if rank == "auto" else rank,
            "conv_kernel": inner.integer("d_conv", default=hf.integer("conv_kernel", default=4)),
            "use_bias": inner.flag("bias", default=hf.flag("use_bias", default=False)),
            "use_conv_bias": inner.flag("conv_bias", default=hf.flag("use_conv_bias", default=True)),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=hf.flag("tie_embeddings", default=True)),
        }


@register("MambaForCausalLM")
class MambaForCausalLM(CausalLM):
    """A stack of norm and mixer."""

    config: MambaConfig
    config_class: ClassVar[type[ModelConfig]] = MambaConfig
    SOURCE_PREFIX = "backbone."
    has_states = True
    WEIGHTS = (*backbone_rules(), *mixer_rules())

    def make_layer(self, index: int) -> nn.Module:
        config = self.config
        sizes = Mamba1Sizes(
            channels=config.intermediate_size,
            state_size=config.state_size,
            dt_rank=config.time_step_rank,
            conv_width=config.conv_kernel,
        )
        mixer = Mamba1Mixer(
            config,
            index,
            sizes,
            name=f"layers.{index}.mixer",
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            norms=self.make_mixer_norms(),
        )
        return MixerLayer(norm=self.make_norm(), mixer=mixer)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)

    def make_mixer_norms(self) -> tuple[Norm, Norm, Norm] | None:
        """Returns the norms of step lengths, b and c in the mixers, where there are any."""
        return None
