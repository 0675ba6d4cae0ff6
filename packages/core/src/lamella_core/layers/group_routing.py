"""Routers that first choose groups of experts (on few machines, say), then experts of these groups.

Legend: T tokens, E experts in G groups of neighbours.
"""

from __future__ import annotations

from typing import Any

import torch

from lamella_core.checks import check_integer
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.layers.activation import sigmoid
from lamella_core.layers.moe import Router
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.sharding import replicated

_LEAST_SUM = 1e-20  # keeps the division by a sum of weights finite
_BEST_OF_GROUP = 2  # experts whose scores make that of their group


class GroupRouter(Router):
    """Softmax over all experts, the ``top_k`` best of the groups that hold the best ones (DeepSeek-V2, 2024).

    Args:
        config: of the whole model.
        num_experts: E.
        top_k: experts of a token.
        name: dotted path of this module.
        num_groups: G; 1: all experts are in one.
        top_groups: groups of a token.
        weight_scale: multiplies the weights.

    Raises:
        ConfigError: groups that do not divide the experts, or too few of them for ``top_k``.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        top_k: int,
        *,
        name: str,
        num_groups: int = 1,
        top_groups: int = 1,
        weight_scale: float = 1.0,
    ) -> None:
        super().__init__(config, num_experts, top_k, name=name)
        check_integer("n_group", num_groups, 1, num_experts, " (the number of experts)")
        check_integer("topk_group", top_groups, 1, num_groups, " (n_group)")
        if num_experts % num_groups:
            raise ConfigError(f"n_group {num_groups} does not divide the {num_experts} experts; correct one of them")
        if top_k > top_groups * (num_experts // num_groups):
            raise ConfigError(
                f"num_experts_per_tok {top_k} exceeds the {top_groups * (num_experts // num_groups)} experts of "
                f"{top_groups} groups (topk_group); correct one of them"
            )
        self.num_groups, self.top_groups = num_groups, top_groups
        self.weight_scale = weight_scale

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shares = torch.softmax(scores, dim=-1)
        weights, experts = self._in_best_groups(shares, 1).topk(self.top_k, dim=-1)
        return experts, weights * self.weight_scale

    def _in_best_groups(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        """Returns scores [T, E], -inf outside the groups whose ``count`` best add up to most."""
        if self.top_groups == self.num_groups:
            return scores
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        best = grouped.topk(count, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
        is_left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        return grouped.masked_fill(is_left_out.unsqueeze(-1), -torch.inf).flatten(-2)


class BiasedGroupRouter(GroupRouter):
    """Sigmoid scores, to which a learned bias of each expert is added for choosing alone (DeepSeek-V3, 2024).

    A group's score is the sum of its two best. With ``renormalize`` a token's weights are rescaled to sum to one,
    before ``weight_scale``. Other arguments are those of `GroupRouter`.
    """

    correction_bias: Parameter  # [E] float32 in every model: near experts differ by less than half precision keeps

    def __init__(
        self, config: ModelConfig, num_experts: int, top_k: int, *, name: str, renormalize: bool = True, **groups: Any
    ) -> None:
        super().__init__(config, num_experts, top_k, name=name, **groups)
        self.renormalize = renormalize
        self.correction_bias = empty_parameter(replicated(num_experts), torch.float32)
        if self.top_groups < self.num_groups and num_experts // self.num_groups < _BEST_OF_GROUP:
            raise ConfigError(f"n_group {self.num_groups} leaves one expert to a group; at least 2 are needed")

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = sigmoid(scores)
        biased = self._in_best_groups(scores + self.correction_bias, _BEST_OF_GROUP)
        experts = biased.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
        return experts, weights * self.weight_scale
