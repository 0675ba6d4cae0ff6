"""Norms of queries and keys before they rotate: (x [T, heads on this rank, D], ctx) -> the same shape."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.kernels import ops
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.sharding import ShardSpec, replicated, split_heads, whole


class HeadNorm(nn.Module):
    """Base of the norms below."""

    weight: Parameter

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        raise NotImplementedError


class HeadRMSNorm(HeadNorm):
    """`RMSNorm` of each head by itself, with one weight [D] for all heads.

    With ``unit_offset`` it multiplies by 1 + weight, see `UnitOffsetRMSNorm`.
    """

    def __init__(self, config: ModelConfig, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.unit_offset = unit_offset
        self.weight = empty_parameter(replicated(config.head_dim), config.torch_dtype)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return ops.head_rms_norm(x, self.weight, self.eps, self.unit_offset)


class PlainHeadNorm(HeadNorm):
    """`HeadRMSNorm` without weights. It commutes with rotation, which changes no length."""

    ones: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.register_buffer("ones", torch.ones(config.head_dim, dtype=config.torch_dtype), persistent=False)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return ops.head_rms_norm(x, self.ones, self.eps, False)


class ProjectionRMSNorm(HeadNorm):
    """`RMSNorm` over all heads together, those of other ranks included; weight [heads * D]."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        mapping = config.mapping
        self.eps = config.norm_eps
        section = split_heads(heads, config.head_dim, mapping.tp_size, mapping.tp_rank, name="heads")
        self.counted = max(1, mapping.tp_size // heads) * section.size  # values in the ranks' sum, copies included
        self.weight = empty_parameter(ShardSpec(dims=((section,),)), config.torch_dtype)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        flat = x.reshape(x.shape[0], -1)
        if ctx.tp.size == 1:
            return ops.rms_norm(flat, self.weight, self.eps)[0].view(x.shape)
        wide = flat.float()
        mean = ctx.tp.all_reduce(wide.pow(2).sum(-1, keepdim=True)) / self.counted
        return ((wide * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight).view(x.shape)


class ProjectionLayerNorm(HeadNorm):
    """LayerNorm without bias over all heads together, those of other ranks included; weight [heads * D]."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        mapping = config.mapping
        self.eps = config.norm_eps
        section = split_heads(heads, config.head_dim, mapping.tp_size, mapping.tp_rank, name="heads")
        self.counted = max(1, mapping.tp_size // heads) * section.size  # values in the ranks' sum, copies included
        self.weight = empty_parameter(ShardSpec(dims=((section,),)), config.torch_dtype)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        flat = x.reshape(x.shape[0], -1)
        if ctx.tp.size == 1:
            return F.layer_norm(flat, flat.shape[1:], self.weight, None, self.eps).view(x.shape)
        wide = flat.float()
        wide = wide - ctx.tp.all_reduce(wide.sum(-1, keepdim=True)) / self.counted
        variance = ctx.tp.all_reduce(wide.pow(2).sum(-1, keepdim=True)) / self.counted
        return (wide * torch.rsqrt(variance + self.eps) * self.weight).to(x.dtype).view(x.shape)


class HeadLayerNorm(HeadNorm):
    """LayerNorm without bias of each head by itself, with a weight of its own: [heads, D]."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        mapping = config.mapping
        self.eps = config.norm_eps
        section = split_heads(heads, 1, mapping.tp_size, mapping.tp_rank, name="heads")
        shard = ShardSpec(dims=((section,), (whole(config.head_dim),)), stacked_experts=True)  # a head's may be alone
        self.weight = empty_parameter(shard, config.torch_dtype)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return (F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)
