"""Feed-forward blocks, their inner size split over the tensor-parallel ranks: [T, H] -> [T, H]."""

from __future__ import annotations

import torch
from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.layers.activation import gated, get_activation
from lamella_core.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020), gate and up in one product."""

    def __init__(self, config: ModelConfig, *, name: str, bias: bool = False) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, {"gate": inner, "up": inner}, bias, config=config, name=f"{name}.gate_up_proj"
        )
        self.activation = gated(config.hidden_act)
        self.down_proj = RowParallelLinear(inner, config.hidden_size, bias, config=config, name=f"{name}.down_proj")

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x, ctx)), ctx)


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, *, name: str, bias: bool = True) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.up_proj = ColumnParallelLinear(config.hidden_size, inner, bias, config=config, name=f"{name}.up_proj")
        self.activation = get_activation(config.hidden_act)
        self.down_proj = RowParallelLinear(inner, config.hidden_size, bias, config=config, name=f"{name}.down_proj")

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x, ctx)), ctx)
