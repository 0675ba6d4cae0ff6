"""DeepSeek-V3 and R1 (2024): as V2, with sigmoid routing balanced by a bias; Moonlight and Kimi-K2 are of this kind.

Layers that guess further tokens (multi-token prediction) are not read. See `lamella_core.layers.latent_attention` for
the shape legend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.hf_config import HfConfig
from lamella_core.layers.group_routing import BiasedGroupRouter
from lamella_core.models._deepseek import DeepseekConfig, DeepseekModel
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DeepseekConfig):
    """DeepSeek-V3's own fields are those of `DeepseekConfig`."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("deepseek_v3", "kimi_k2")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; where pairs rotate, they are neighbours by default."""
        hf.require("scoring_func", ("sigmoid",), default="sigmoid")
        hf.require("topk_method", ("noaux_tc",), default="noaux_tc")
        return {
            **cls.shared_fields(hf, interleaved=hf.flag("rope_interleave", default=True)),
            **cls.group_fields(hf, 1),
            "norm_topk_prob": hf.flag("norm_topk_prob", default=True),
        }


@register("DeepseekV3ForCausalLM")
class DeepseekV3ForCausalLM(DeepseekModel):
    """Sigmoid routing with a bias for choosing, limited to the best groups."""

    config: DeepseekV3Config
    config_class = DeepseekV3Config
    WEIGHTS = (
        *DeepseekModel.WEIGHTS,
        WeightRule("model.layers.{i}.mlp.gate.e_score_correction_bias", "layers.{i}.mlp.router.correction_bias"),
    )

    def make_router(self, name: str) -> BiasedGroupRouter:
        config = self.config
        return BiasedGroupRouter(
            config,
            config.num_experts,
            config.num_experts_per_tok,
            name=name,
            num_groups=config.n_group,
            top_groups=config.topk_group,
            weight_scale=config.routed_scaling_factor,
            renormalize=config.norm_topk_prob,
        )
