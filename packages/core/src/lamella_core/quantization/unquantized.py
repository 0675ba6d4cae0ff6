"""Unquantized: weights in the model's dtype, multiplied by the kernel that the layer's plan names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lamella_core.kernels.experts import ExpertProjection
from lamella_core.kernels.matmul import default_plan
from lamella_core.layers.parameter import empty_parameter
from lamella_core.quantization.config import QuantConfig

if TYPE_CHECKING:
    from lamella_core.kernels.fused import FusedStep
    from lamella_core.layers.linear import Linear


class Unquantized:
    """weight [out, in] (or [experts, out, in]), row-major until a builder lays it out for a kernel."""

    def __init__(self, config: QuantConfig) -> None:
        pass

    def create_weights(self, layer: Linear) -> None:
        layer.weight = empty_parameter(layer.weight_shard, layer.dtype)
        layer.plan = default_plan(
            layer.dtype,
            layer.out_features_local,
            layer.in_features_local,
            batch_invariant=layer.dtype == torch.float32,
            layout="rows",
        )

    def input_scale(self, layer: Linear) -> torch.Tensor | None:
        return None

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, expert: int | None = None
    ) -> torch.Tensor:
        weight = layer.weight if expert is None else layer.weight[expert]
        return layer.plan.run(x, weight, layer.out_features_local, bias)

    def apply_fused(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, after: FusedStep
    ) -> torch.Tensor | None:
        fused = layer.plan.fused(x.shape[0], layer.out_features_local, type(after), bias is None)
        return None if fused is None else fused(x, layer.weight, bias, None, after)

    def stacked(self, layer: Linear, bias: torch.Tensor | None) -> ExpertProjection:
        return ExpertProjection(layer.weight, bias)
