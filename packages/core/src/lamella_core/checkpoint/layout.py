"""The weights of a model that matmul kernels read: finding them, and moving them between layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lamella_core.kernels.matmul import MatmulPlan, from_layout, to_layout
from lamella_core.layers.embedding import LMHead, VocabMatrix, VocabParallelEmbedding
from lamella_core.layers.linear import Linear

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM

PLAIN_LAYOUT = "rows"


@dataclass(frozen=True)
class MatmulWeight:
    """One weight [n, k] (or [experts, n, k]) of this rank and the layer that holds it and its plan."""

    name: str  # of the parameter
    module: Linear | VocabMatrix | LMHead  # has `weight` and `plan`
    n: int  # output features on this rank
    k: int  # input features on this rank
    is_output_layer: bool  # multiplies only the rows whose logits are wanted

    @property
    def plan(self) -> MatmulPlan:
        return self.module.plan

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight.detach()

    @property
    def is_stacked(self) -> bool:
        """Whether the weight has a leading dimension of experts."""
        return self.module.weight.shard.stacked_experts


def matmul_weights(model: CausalLM) -> list[MatmulWeight]:
    """Returns the weights that kernels read, in model order; a tied embedding counts as the output layer's weight."""
    found = []
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, Linear) and hasattr(module, "weight"):
            found.append(MatmulWeight(key, module, module.out_features_local, module.in_features_local, False))
        elif isinstance(module, (LMHead, VocabParallelEmbedding)) and _is_output_layer(model, module):
            found.append(MatmulWeight(key, module, module.rows.padded_length, module.weight.shard.shape[1], True))
    return found


def _is_output_layer(model: CausalLM, module: LMHead | VocabParallelEmbedding) -> bool:
    """Whether logits are computed with the module's own weight."""
    if isinstance(module, LMHead):
        return "weight" in module._parameters
    return model.config.tie_word_embeddings and model.lm_head is not None


def arrange(weight: torch.Tensor, layout: str) -> torch.Tensor:
    """Returns a plain weight [n, k] or [experts, n, k] in ``layout``."""
    if weight.dim() == 3:
        return torch.stack([to_layout(expert, layout) for expert in weight])
    return to_layout(weight, layout)


def restore(weight: torch.Tensor, layout: str, n: int, *, stacked: bool = False) -> torch.Tensor:
    """Returns the plain weight of one stored in ``layout``; inverse of `arrange`."""
    if stacked:
        return torch.stack([from_layout(expert, layout, n) for expert in weight])
    return from_layout(weight, layout, n)


def plain_weights(model: CausalLM) -> dict[str, torch.Tensor]:
    """Returns the rank's parameters by name in the plain layout; those that a kernel's layout changed are copies."""
    weights: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for held in matmul_weights(model):
        if held.plan.layout != PLAIN_LAYOUT:
            weights[held.name] = restore(held.weight, held.plan.layout, held.n, stacked=held.is_stacked)
    return weights
