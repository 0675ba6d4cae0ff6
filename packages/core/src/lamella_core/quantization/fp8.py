"""FP8: weights and activations as float8 (e4m3fn) with float32 scales; products accumulate in float32.

Per tensor (QuantAlgo.FP8), as in ModelOpt's checkpoints: one scale for a weight, and one for its inputs that was
calibrated beforehand ("static"), or one per token, found as they come ("dynamic"). Per channel and token
(QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN): one scale per output feature, and dynamic activations.

Biases, results and everything between two products have the model's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lamella_core.kernels.experts import ExpertProjection
from lamella_core.kernels.fp8 import FLOAT8, quantize, quantize_per_token
from lamella_core.kernels.fused import AddAfter
from lamella_core.kernels.matmul import Scales, default_plan
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.sharding import ShardSpec
from lamella_core.quantization.config import QuantConfig

if TYPE_CHECKING:
    from lamella_core.kernels.fused import FusedStep
    from lamella_core.layers.linear import Linear


class Fp8PerTensor:
    """weight [out, in] float8, weight_scale [] and, if static, activation_scale []; experts add a dimension in front.

    A fused projection has one scale: the largest of its parts'. See `lamella_core.checkpoint.float8`.
    """

    def __init__(self, config: QuantConfig) -> None:
        self.is_static = config.has_static_activations

    def create_weights(self, layer: Linear) -> None:
        layer.weight = empty_parameter(layer.weight_shard, FLOAT8)
        layer.weight_scale = empty_parameter(self._scale_shard(layer), torch.float32)
        if self.is_static:
            layer.activation_scale = empty_parameter(self._per_expert(layer), torch.float32)
        layer.plan = default_plan(
            FLOAT8,
            layer.out_features_local,
            layer.in_features_local,
            batch_invariant=layer.dtype == torch.float32,
            layout="rows",
        )

    def input_scale(self, layer: Linear) -> torch.Tensor | None:
        return layer.activation_scale if self.is_static and layer.experts is None else None

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, expert: int | None = None
    ) -> torch.Tensor:
        weight, scale = _of_expert(layer.weight, expert), _of_expert(layer.weight_scale, expert)
        x, x_scale = self._quantized(layer, x, expert)
        return layer.plan.run(x, weight, layer.out_features_local, bias, Scales(x_scale, scale, layer.dtype))

    def apply_fused(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, after: FusedStep
    ) -> torch.Tensor | None:
        is_plain = bias is None and layer.weight_scale.numel() == 1
        fused = layer.plan.fused(x.shape[0], layer.out_features_local, type(after), is_plain)
        if fused is None or (isinstance(after, AddAfter) and not self.is_static):  # sums have one scale for all rows
            return None
        x, x_scale = self._quantized(layer, x, None)
        return fused(x, layer.weight, bias, Scales(x_scale, layer.weight_scale, layer.dtype), after)

    def stacked(self, layer: Linear, bias: torch.Tensor | None) -> ExpertProjection:
        return ExpertProjection(
            layer.weight, bias, layer.weight_scale, layer.activation_scale if self.is_static else None
        )

    def _quantized(self, layer: Linear, x: torch.Tensor, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x as float8 and its scale or scales."""
        if not self.is_static:
            return quantize_per_token(x)
        scale = _of_expert(layer.activation_scale, expert)
        return (x if x.dtype == FLOAT8 else quantize(x, scale)), scale

    def _scale_shard(self, layer: Linear) -> ShardSpec:
        return self._per_expert(layer)

    def _per_expert(self, layer: Linear) -> ShardSpec:
        """Of one number for the whole weight, or for each expert's."""
        if layer.experts is None:
            return ShardSpec(dims=())
        return ShardSpec(dims=((layer.experts,),), stacked_experts=True)


class Fp8PerChannel(Fp8PerTensor):
    """weight [out, in] float8 and weight_scale [out], with dynamic activations; experts add a dimension in front."""

    def _scale_shard(self, layer: Linear) -> ShardSpec:
        return ShardSpec(dims=layer.weight_shard.dims[:-1], stacked_experts=layer.experts is not None)


def _of_expert(parameter: Parameter, expert: int | None) -> torch.Tensor:
    return parameter if expert is None else parameter[expert]
