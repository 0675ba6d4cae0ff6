"""Decoder layers: attention and feed-forward, each added to the stream.

`DecoderLayer` norms before each (most decoders), and after them too if asked; `PostNormDecoderLayer` only after;
`NormAfterLayer` norms the stream itself; `ParallelDecoderLayer` computes both from the same stream; `SkippedLayer`
stands where there is neither. Each takes and returns (hidden [T, H], residual [T, H] or None): their sum is the stream,
added by the next norm. With ``rows`` [R] only those tokens go on after the attention, which sees all; the results are
[R, H].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lamella_core.context import ForwardContext
from lamella_core.kernels.fused import LEAST_ADDED_ROWS
from lamella_core.layers.attention import Attention
from lamella_core.layers.linear import Stream
from lamella_core.layers.mixer import TokenMixer
from lamella_core.layers.mlp import FeedForward
from lamella_core.layers.norm import Norm
from lamella_core.layers.rotary import Rotation


class DecoderLayer(nn.Module):
    """Pre-norm block.

    Args:
        input_norm: of the stream, for the attention.
        attention: of this layer, or another token mixer.
        mlp_norm: of the stream, for the feed-forward.
        mlp: feed-forward of this layer.
        attention_out_norm: of what the attention adds to the stream.
        mlp_out_norm: of what the feed-forward adds.
        residual_scale: multiplies what either adds.
    """

    selects_rows = True  # takes ``rows``

    def __init__(
        self,
        *,
        input_norm: Norm,
        attention: TokenMixer,
        mlp_norm: Norm,
        mlp: FeedForward,
        attention_out_norm: Norm | None = None,
        mlp_out_norm: Norm | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.attention = attention
        self.attention_out_norm = attention_out_norm
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_out_norm = mlp_out_norm
        self.residual_scale = residual_scale
        self.adds_unchanged = attention_out_norm is None and mlp_out_norm is None and residual_scale == 1.0
        self.sums_hidden = self.sums_attended = False  # whether these come as one rank's summands, see `share_sums`

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale = self.attention.input_scale
        if self.sums_hidden and residual is not None:
            normed, residual = self.input_norm.of_sum(hidden, residual, scale, ctx.tp)
        else:
            normed, residual = self.input_norm(hidden, residual, scale)
        if rows is not None:
            residual = residual.index_select(0, rows)
        attended, residual = self._onto(residual, self.attention, normed, rotation, ctx, rows)
        if rows is not None and not rows.shape[0]:
            return attended, residual
        scale = self.mlp.input_scale
        if self.sums_attended and residual is not None:
            normed, residual = self.mlp_norm.of_sum(attended, residual, scale, ctx.tp)
        else:
            normed, residual = self.mlp_norm(self._added(attended, self.attention_out_norm), residual, scale)
        hidden, residual = self._onto(residual, self.mlp, normed, ctx)
        return self._added(hidden, self.mlp_out_norm), residual

    def _onto(
        self, residual: torch.Tensor, half: TokenMixer | FeedForward, *arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what the half makes of its arguments, and the stream; or their sum and None, where that is faster."""
        if residual.shape[0] < LEAST_ADDED_ROWS or not half.takes_stream or not self.adds_unchanged:
            return half(*arguments), residual
        stream = Stream(residual)
        return half(*arguments, stream), stream.left

    def _added(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if norm is not None:
            x = norm(x)[0]
        return x if self.residual_scale == 1.0 else x * self.residual_scale


def share_sums(layers: Iterable[nn.Module]) -> None:
    """Leaves sums over the ranks to the norms that read them next, which may do both at once (see `Norm.of_sum`).

    The second norm of a `DecoderLayer` sums for its attention, the first norm for the feed-forward of the layer before.
    The last layer's result stays a sum. A `ParallelDecoderLayer` sums once for both halves.
    """
    before: nn.Module | None = None
    for layer in layers:
        if type(layer) is DecoderLayer:
            if type(before) is DecoderLayer and before.mlp_out_norm is None and before.residual_scale == 1.0:
                layer.sums_hidden = before.mlp.leave_sum()
            if layer.attention_out_norm is None and layer.residual_scale == 1.0:
                layer.sums_attended = layer.attention.leave_sum()
        elif isinstance(layer, ParallelDecoderLayer) and layer.mlp.leave_sum():
            layer.sums_both = layer.attention.leave_sum()
        before = layer


class NormAfterLayer(DecoderLayer):
    """Norms the stream after each addition (Vaswani et al. 2017): ``input_norm`` after the attention's."""

    selects_rows = False

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        hidden, _ = self.input_norm(self.attention(hidden, rotation, ctx), hidden)
        return self.mlp_norm(self.mlp(hidden, ctx), hidden)[0], None


class PostNormDecoderLayer(nn.Module):
    """Norms what attention and feed-forward add to the stream, not what they read (OLMo 2, 2024)."""

    selects_rows = True

    def __init__(self, *, attention: Attention, attention_norm: Norm, mlp: FeedForward, mlp_norm: Norm) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream = hidden if residual is None else hidden + residual
        attended = self.attention(stream, rotation, ctx, rows)
        if rows is not None:
            stream = stream.index_select(0, rows)
            if not stream.shape[0]:
                return attended, stream
        stream = stream + self.attention_norm(attended)[0]
        return self.mlp_norm(self.mlp(stream, ctx))[0], stream


class ParallelDecoderLayer(nn.Module):
    """Attention and feed-forward side by side (Wang and Komatsuzaki 2021), both added to the stream they read.

    ``mlp_norm`` is of the stream for the feed-forward; None: it reads what the attention does.
    """

    selects_rows = True

    def __init__(
        self, *, input_norm: Norm, attention: Attention, mlp: FeedForward, mlp_norm: Norm | None = None
    ) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.sums_both = False  # whether the halves come as one rank's summands, see `share_sums`

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.input_norm(hidden, residual)
        attended = self.attention(normed, rotation, ctx, rows)
        if rows is not None:
            normed, residual = normed.index_select(0, rows), residual.index_select(0, rows)
            if not residual.shape[0]:
                return attended, residual
        if self.mlp_norm is not None:
            normed = self.mlp_norm(residual)[0]
        added = attended + self.mlp(normed, ctx)
        return ctx.tp.all_reduce(added) if self.sums_both else added, residual


class SkippedLayer(nn.Module):
    """Leaves the stream as it is."""

    selects_rows = True

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if rows is None:
            return hidden, residual
        return hidden.index_select(0, rows), residual.index_select(0, rows) if residual is not None else None


class MixerLayer(nn.Module):
    """A norm and a token mixer; nothing else."""

    selects_rows = True

    def __init__(self, *, norm: Norm, mixer: TokenMixer) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.norm(hidden, residual, self.mixer.input_scale)
        mixed = self.mixer(normed, rotation, ctx, rows)
        return mixed, residual if rows is None else residual.index_select(0, rows)


class FeedForwardLayer(nn.Module):
    """A norm and a feed-forward; nothing else."""

    selects_rows = True

    def __init__(self, *, norm: Norm, mlp: FeedForward) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rows is not None:
            hidden = hidden.index_select(0, rows)
            residual = residual.index_select(0, rows) if residual is not None else None
            if not hidden.shape[0]:
                return hidden, hidden if residual is None else residual
        normed, residual = self.norm(hidden, residual, self.mlp.input_scale)
        return self.mlp(normed, ctx), residual
