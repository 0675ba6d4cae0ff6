"""Selective state spaces as token mixers: Mamba (Gu and Dao 2023) and Mamba-2 (Dao and Gu 2024).

A causal convolution and a recurrence per channel, so a sequence needs a state of fixed size instead of keys and values.
Channels, heads and groups are split over the tensor-parallel ranks. What is exponentiated is float32 whatever the
model's dtype, and never quantized.

Shape legend: T tokens of this step (packed, no padding), H hidden size; on this rank C channels, or K heads of P
channels in G groups; N numbers of a state per channel, W width of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext, StateSpec
from lamella_core.kernels import ops
from lamella_core.layers.activation import silu
from lamella_core.layers.linear import ColumnParallelLinear, Linear, MergedColumnParallelLinear, RowParallelLinear
from lamella_core.layers.mixer import RecurrentMixer
from lamella_core.layers.norm import Norm
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.rotary import Rotation
from lamella_core.layers.sharding import Section, ShardSpec, fused, split, split_heads, whole
from lamella_core.quantization.config import QuantConfig


class CausalConv(nn.Module):
    """Convolves each channel with its last ``width`` inputs, then SiLU: [T, C] -> [T, C]."""

    weight: Parameter  # [C, 1, W]
    bias: Parameter | None  # [C]

    def __init__(self, channels: Sequence[Section], width: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(ShardSpec(dims=(tuple(channels), (whole(1),), (whole(width),))), dtype)
        self.bias = empty_parameter(ShardSpec(dims=(tuple(channels),)), dtype) if bias else None


@dataclass(frozen=True, kw_only=True)
class Mamba1Sizes:
    """Of the whole layer."""

    channels: int
    state_size: int  # N
    dt_rank: int  # inner size of the projection to step lengths
    conv_width: int  # W


class Mamba1Mixer(RecurrentMixer):
    """Mamba's mixer: every channel has its own recurrence, b and c are shared by all: [T, H] -> [T, H].

    Args:
        config: of the whole model.
        index: layer number in the whole model.
        sizes: of the layer.
        name: dotted path of this module.
        bias: whether the projections in and out have one.
        conv_bias: whether the convolution has one.
        norms: of step lengths [T, dt_rank], b [T, N] and c [T, N] as they are projected; None: they stay.
    """

    a_log: Parameter  # [C, N] float32
    d: Parameter  # [C] float32
    dt_bias: Parameter  # [C] float32

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        sizes: Mamba1Sizes,
        *,
        name: str,
        bias: bool = False,
        conv_bias: bool = True,
        norms: tuple[Norm, Norm, Norm] | None = None,
    ) -> None:
        super().__init__()
        channels, dtype = sizes.channels, config.torch_dtype
        plain = replace(config, quantization=QuantConfig())
        self.splits = (sizes.dt_rank, sizes.state_size, sizes.state_size)
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size, {"x": channels, "z": channels}, bias, config=config, name=f"{name}.in_proj"
        )
        own = split(channels, config.mapping.tp_size, config.mapping.tp_rank, what=f"the channels of {name}")
        self.conv = CausalConv((own,), sizes.conv_width, conv_bias, dtype)
        self.x_proj = RowParallelLinear(channels, sum(self.splits), False, config=plain, name=f"{name}.x_proj")
        self.dt_proj = ColumnParallelLinear(sizes.dt_rank, channels, False, config=plain, name=f"{name}.dt_proj")
        self.norms = nn.ModuleDict(dict(zip(("dt", "b", "c"), norms))) if norms is not None else None
        self.a_log = empty_parameter(ShardSpec(dims=((own,), (whole(sizes.state_size),))), torch.float32)
        self.d, self.dt_bias = (empty_parameter(ShardSpec(dims=((own,),)), torch.float32) for _ in range(2))
        self.out_proj = RowParallelLinear(channels, config.hidden_size, bias, config=config, name=f"{name}.out_proj")
        self.state_spec = StateSpec(
            index,
            shapes=((own.length, sizes.conv_width - 1), (own.length, 1, sizes.state_size)),
            dtypes=(dtype, torch.float32),
        )

    @property
    def input_scale(self) -> torch.Tensor | None:
        return self.in_proj.input_scale

    def forward(
        self, x: torch.Tensor, rotation: Rotation | None, ctx: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        step = ctx.recurrent(self.state_spec)
        windows, states = step.pools
        inputs, gate = self.in_proj(x, ctx).chunk(2, dim=-1)
        inputs = ops.causal_conv1d(inputs, self.conv.weight[:, 0], self.conv.bias, windows, step)
        dt, b, c = self.x_proj(inputs, ctx).split_with_sizes(self.splits, dim=-1)
        if self.norms is not None:
            dt, b, c = (norm(part)[0] for norm, part in zip(self.norms.values(), (dt, b, c)))
        params = ops.ScanParameters(self.a_log, self.d, self.dt_bias)
        dt, b, c = self.dt_proj(dt, ctx), b.unsqueeze(1), c.unsqueeze(1)
        out = ops.selective_scan(inputs.unsqueeze(2), dt, b, c, params, states, step).squeeze(2)
        if rows is not None:
            out, gate = out.index_select(0, rows), gate.index_select(0, rows)
            if not out.shape[0]:
                return x.new_empty(0, self.out_proj.out_features_local, dtype=out.dtype)
        return self.out_proj(out * silu(gate), ctx)


class GroupedGatedNorm(nn.Module):
    """rms norm of y * silu(gate), each group of channels by itself, times weight: [T, C] -> [T, C].

    A group may be spread over ranks, which then add their squares.
    """

    weight: Parameter  # [C]

    def __init__(self, config: ModelConfig, channels: int, groups: int) -> None:
        super().__init__()
        mapping = config.mapping
        own = split(channels, mapping.tp_size, mapping.tp_rank, what="the channels of the norm")
        self.eps = config.norm_eps
        self.size = channels // groups
        self.num_groups = groups
        self.first_group = own.start // self.size
        self.weight = empty_parameter(ShardSpec(dims=((own,),)), config.torch_dtype)

    def forward(self, y: torch.Tensor, gate: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        gated = y.float() * silu(gate.float())
        if gated.shape[1] % self.size == 0:
            groups = gated.view(-1, self.size)
            normed = ops.rms_norm(groups, torch.ones_like(groups[0]), self.eps)[0].view(gated.shape)
        else:  # this rank has a part of one group
            sums = gated.new_zeros(gated.shape[0], self.num_groups)
            sums[:, self.first_group] = gated.square().sum(-1)
            means = ctx.tp.all_reduce(sums)[:, self.first_group, None] / self.size
            normed = gated * torch.rsqrt(means + self.eps)
        return normed.to(y.dtype) * self.weight


@dataclass(frozen=True, kw_only=True)
class Mamba2Sizes:
    """Of the whole layer."""

    heads: int
    head_dim: int  # P
    groups: int  # of heads that share b and c
    state_size: int  # N
    conv_width: int  # W
    dt_min: float = 0.0  # bounds of a step's length
    dt_max: float | None = None  # None: no bound

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


class Mamba2Mixer(RecurrentMixer):
    """Mamba-2's mixer: all channels of a head decay alike, groups of heads share b and c: [T, H] -> [T, H].

    Arguments are those of `Mamba1Mixer`.
    """

    a_log: Parameter  # [K] float32
    d: Parameter  # [K] float32
    dt_bias: Parameter  # [K] float32

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        sizes: Mamba2Sizes,
        *,
        name: str,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        tp, rank, dtype = config.mapping.tp_size, config.mapping.tp_rank, config.torch_dtype
        self.sizes = sizes
        z, x = (split(sizes.channels, tp, rank, what=f"the channels of {name}", name=key) for key in ("z", "x"))
        b, c = (split_heads(sizes.groups, sizes.state_size, tp, rank, name=key) for key in ("b", "c"))
        dt = split(sizes.heads, tp, rank, what=f"the heads of {name}", name="dt")
        inner = fused((z, x, b, c, dt))
        self.in_proj = Linear(whole(config.hidden_size), inner, bias, config=config, name=f"{name}.in_proj")
        convolved = fused((x, b, c))
        self.conv = CausalConv(convolved, sizes.conv_width, conv_bias, dtype)
        per_head = ShardSpec(dims=((replace(dt, name=None),),))
        self.a_log, self.d, self.dt_bias = (empty_parameter(per_head, torch.float32) for _ in range(3))
        self.norm = GroupedGatedNorm(config, sizes.channels, sizes.groups)
        self.out_proj = RowParallelLinear(
            sizes.channels, config.hidden_size, bias, config=config, name=f"{name}.out_proj"
        )
        self.splits = (z.length, sum(section.length for section in convolved), dt.length)
        self.conv_splits = tuple(section.length for section in convolved)
        self.state_spec = StateSpec(
            index,
            shapes=((self.splits[1], sizes.conv_width - 1), (dt.length, sizes.head_dim, sizes.state_size)),
            dtypes=(dtype, torch.float32),
        )

    @property
    def input_scale(self) -> torch.Tensor | None:
        return self.in_proj.input_scale

    def forward(
        self, x: torch.Tensor, rotation: Rotation | None, ctx: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        step, sizes, tokens = ctx.recurrent(self.state_spec), self.sizes, x.shape[0]
        windows, states = step.pools
        gate, inputs, dt = self.in_proj(x, ctx).split_with_sizes(self.splits, dim=-1)
        inputs = ops.causal_conv1d(inputs, self.conv.weight[:, 0], self.conv.bias, windows, step)
        inputs, b, c = inputs.split_with_sizes(self.conv_splits, dim=-1)
        heads = inputs.unflatten(1, (-1, sizes.head_dim))
        b, c = (tensor.unflatten(1, (-1, sizes.state_size)) for tensor in (b, c))
        params = ops.ScanParameters(self.a_log, self.d, self.dt_bias, sizes.dt_min, sizes.dt_max)
        out = ops.selective_scan(heads, dt, b, c, params, states, step).reshape(tokens, -1)
        if rows is not None:
            out, gate = out.index_select(0, rows), gate.index_select(0, rows)
            if not out.shape[0]:
                return x.new_empty(0, self.out_proj.out_features_local, dtype=out.dtype)
        return self.out_proj(self.norm(out, gate, ctx), ctx)
