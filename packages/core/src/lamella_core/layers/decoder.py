"""DecoderLayer: the pre-norm block that most decoders share: attention, then feed-forward, each added to the stream."""

from __future__ import annotations

import torch
from torch import nn

from lamella_core.context import ForwardContext
from lamella_core.layers.attention import Attention
from lamella_core.layers.mlp import FeedForward
from lamella_core.layers.norm import Norm
from lamella_core.layers.rotary import Rotation


class DecoderLayer(nn.Module):
    """Takes and returns (hidden [T, H], residual [T, H] or None): their sum is the stream, added by the next norm.

    With ``rows`` [R] only those tokens go on after the attention, which sees all; the results are [R, H].
    """

    selects_rows = True  # takes ``rows``

    def __init__(self, *, input_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: FeedForward) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.input_norm(hidden, residual, self.attention.input_scale)
        attended = self.attention(normed, rotation, ctx, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
            if not residual.shape[0]:
                return attended, residual
        normed, residual = self.mlp_norm(attended, residual, self.mlp.input_scale)
        return self.mlp(normed, ctx), residual
