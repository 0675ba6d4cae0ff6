"""Feed-forward blocks, their inner size split over the tensor-parallel ranks: [T, H] -> [T, H]."""

from __future__ import annotations

import torch
from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.layers.activation import gated, get_activation
from lamella_core.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear, Stream


class FeedForward(nn.Module):
    """The second half of a decoder layer: called with (x [T, H], ctx), returns [T, H]."""

    takes_stream = False  # whether a `Stream` [T, H] may be the third argument

    @property
    def input_scale(self) -> torch.Tensor | None:
        """Scale with which x may also come as float8, see `Linear.input_scale`; None: only in the model's dtype."""
        return None

    def leave_sum(self) -> bool:
        """Whether from now on this returns its rank's summand, for the next norm to sum; False: it sums, as before."""
        return False


class GatedMLP(FeedForward):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020), gate and up in one product.

    ``inner`` is by default the config's intermediate_size. For ``reduce`` see `RowParallelLinear`.
    """

    takes_stream = True

    def __init__(
        self, config: ModelConfig, *, name: str, bias: bool = False, inner: int | None = None, reduce: bool = True
    ) -> None:
        super().__init__()
        inner = config.intermediate_size if inner is None else inner
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, {"gate": inner, "up": inner}, bias, config=config, name=f"{name}.gate_up_proj"
        )
        self.activation = gated(config.hidden_act)
        self.down_proj = RowParallelLinear(
            inner, config.hidden_size, bias, config=config, name=f"{name}.down_proj", reduce=reduce
        )

    @property
    def input_scale(self) -> torch.Tensor | None:
        return self.gate_up_proj.input_scale

    def leave_sum(self) -> bool:
        self.down_proj.reduce = False
        return True

    def forward(self, x: torch.Tensor, ctx: ForwardContext, stream: Stream | None = None) -> torch.Tensor:
        inner = self.gate_up_proj.gated(x, self.activation, self.down_proj.input_scale, ctx)
        return self.down_proj(inner, ctx, stream)


class MLP(FeedForward):
    """down(activation(up(x))). Arguments are those of `GatedMLP`."""

    takes_stream = True

    def __init__(
        self, config: ModelConfig, *, name: str, bias: bool = True, inner: int | None = None, reduce: bool = True
    ) -> None:
        super().__init__()
        inner = config.intermediate_size if inner is None else inner
        self.up_proj = ColumnParallelLinear(config.hidden_size, inner, bias, config=config, name=f"{name}.up_proj")
        self.activation = get_activation(config.hidden_act)
        self.down_proj = RowParallelLinear(
            inner, config.hidden_size, bias, config=config, name=f"{name}.down_proj", reduce=reduce
        )

    @property
    def input_scale(self) -> torch.Tensor | None:
        return self.up_proj.input_scale

    def leave_sum(self) -> bool:
        self.down_proj.reduce = False
        return True

    def forward(self, x: torch.Tensor, ctx: ForwardContext, stream: Stream | None = None) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x, ctx)), ctx, stream)
