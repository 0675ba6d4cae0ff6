"""Norms that also carry the residual stream: one pass adds the layer's output to it and normalises the sum."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lamella_core.context import Communicator
from lamella_core.kernels import ops
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.sharding import replicated


class Norm(nn.Module):
    """Called with x [T, H] and the residual stream [T, H] (or None); returns (normed sum, sum).

    With ``out_scale`` [] float32 the normed sum may come as float8, divided by it (see `Linear.input_scale`).
    """

    weight: Parameter

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(replicated(hidden_size), dtype)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, out_scale: torch.Tensor | None, tp: Communicator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called with this rank's summand of x; returns what `forward` does of the sum over the ranks."""
        return self(tp.all_reduce(x), residual, out_scale)


class RMSNorm(Norm):
    """x / rms(x) * weight (Zhang and Sennrich 2019); the statistics in float32."""

    unit_offset = False

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, residual, out_scale, self.unit_offset)

    def of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, out_scale: torch.Tensor | None, tp: Communicator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fused = tp.rms_norm_of_sum(x, residual, self.weight, self.eps, out_scale, self.unit_offset)
        return super().of_sum(x, residual, out_scale, tp) if fused is None else fused


class PlainRMSNorm(Norm):
    """x / rms(x), without weights."""

    ones: torch.Tensor

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, eps, dtype)
        self.weight = None  # type: ignore[assignment]
        self.register_buffer("ones", torch.ones(hidden_size, dtype=dtype), persistent=False)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rms_norm(x, self.ones, self.eps, residual, out_scale)


class UnitOffsetRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), rounded only then (Gemma, 2024)."""

    unit_offset = True


class LayerNorm(Norm):
    """(x - mean) / deviation * weight + bias (Ba et al. 2016); neither weight nor bias unless ``affine``."""

    bias: Parameter | None

    def __init__(
        self, hidden_size: int, eps: float, dtype: torch.dtype, bias: bool = True, affine: bool = True
    ) -> None:
        super().__init__(hidden_size, eps, dtype)
        if not affine:
            self.weight = None  # type: ignore[assignment]
        self.bias = empty_parameter(replicated(hidden_size), dtype) if bias and affine else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if residual is None else x + residual
        return F.layer_norm(total, (total.shape[-1],), self.weight, self.bias, self.eps), total


class LayerNorm1P(LayerNorm):
    """`LayerNorm` whose stored weights are one less than what they multiply by."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if residual is None else x + residual
        return F.layer_norm(total, (total.shape[-1],), self.weight + 1.0, self.bias, self.eps), total
