"""Falcon Mamba (Zuo et al. 2024): Mamba with norms without weights of step lengths, b and c."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lamella_core.hf_config import HfConfig
from lamella_core.layers.norm import Norm, PlainRMSNorm
from lamella_core.models.mamba import MambaConfig, MambaForCausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class FalconMambaConfig(MambaConfig):
    """Falcon Mamba's own fields."""

    mixer_rms_eps: float = 1e-6

    hf_model_types: ClassVar[tuple[str, ...]] = ("falcon_mamba",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        return {**super().from_hf(hf), "mixer_rms_eps": hf.number("mixer_rms_eps", default=1e-6)}


@register("FalconMambaForCausalLM")
class FalconMambaForCausalLM(MambaForCausalLM):
    """A stack of norm and mixer."""

    config: FalconMambaConfig
    config_class = FalconMambaConfig

    def make_mixer_norms(self) -> tuple[Norm, Norm, Norm]:
        config = self.config
        dt, b, c = (
            PlainRMSNorm(size, config.mixer_rms_eps, config.torch_dtype)
            for size in (config.time_step_rank, config.state_size, config.state_size)
        )
        return dt, b, c
