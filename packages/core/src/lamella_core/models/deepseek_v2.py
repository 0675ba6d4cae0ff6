"""DeepSeek-V2 (2024): multi-head latent attention, many small experts beside shared ones, chosen within groups.

V2-Lite has no latent for its queries and no groups. See `lamella_core.layers.latent_attention` for the shape legend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lamella_core.hf_config import HfConfig
from lamella_core.layers.group_routing import GroupRouter
from lamella_core.models._deepseek import DeepseekConfig, DeepseekModel
from lamella_core.models.registry import register

_GREEDY, _LIMITED = "greedy", "group_limited_greedy"


@dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(DeepseekConfig):
    """``n_group`` is 1 where experts are chosen among all."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("deepseek_v2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; neighbouring elements rotate in pairs."""
        hf.require("scoring_func", ("softmax",), default="softmax")
        hf.require("norm_topk_prob", (False, None), default=False)
        hf.require("mlp_bias", (False, None), default=False)
        method = hf.require("topk_method", (_GREEDY, _LIMITED, None), default=_GREEDY)
        groups = cls.group_fields(hf, 1)
        return {
            **cls.shared_fields(hf),
            **(groups if method == _LIMITED else {"n_group": 1, "topk_group": 1}),
        }


@register("DeepseekV2ForCausalLM")
class DeepseekV2ForCausalLM(DeepseekModel):
    """Softmax routing, limited to the groups that hold the best experts."""

    config: DeepseekV2Config
    config_class = DeepseekV2Config

    def make_router(self, name: str) -> GroupRouter:
        config = self.config
        return GroupRouter(
            config,
            config.num_experts,
            config.num_experts_per_tok,
            name=name,
            num_groups=config.n_group,
            top_groups=config.topk_group,
            weight_scale=config.routed_scaling_factor,
        )
