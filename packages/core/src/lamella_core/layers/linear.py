"""Linear layers split over the tensor-parallel ranks (Shoeybi et al. 2019), each with a quantization method.

Column parallel splits the outputs and needs no communication; row parallel splits the inputs and sums over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.kernels.fused import AddAfter, RopeCacheAfter
from lamella_core.kernels.matmul import MatmulPlan
from lamella_core.layers.activation import GatedActivation, fusible_gate
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.sharding import Section, ShardSpec, fused, split, split_heads, whole
from lamella_core.quantization.base import LinearMethod, linear_method


class Linear(nn.Module):
    """x [T, in] -> [T, out] on this rank's part of the weight, without communication.

    ``plan`` says in which layout ``weight`` lies and which kernel multiplies by it. ``experts`` stacks the weights of
    several experts along a leading dimension.
    """

    weight: Parameter
    weight_scale: Parameter  # of quantized weights, see their method
    activation_scale: Parameter  # of inputs that are quantized with a scale known beforehand
    bias: Parameter | None
    plan: MatmulPlan

    def __init__(
        self,
        in_section: Section,
        out_sections: Sequence[Section],
        bias: bool,
        *,
        config: ModelConfig,
        name: str,
        experts: Section | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.dtype = config.torch_dtype
        self.in_section = in_section
        self.out_sections = tuple(out_sections)
        self.experts = experts
        self.in_features_local = in_section.padded_length
        self.out_features_local = sum(s.padded_length for s in self.out_sections)
        self.method: LinearMethod = linear_method(config, name)
        self.method.create_weights(self)
        self.bias = empty_parameter(self._bias_shard, self.dtype) if bias else None

    @property
    def weight_shard(self) -> ShardSpec:
        """Of weights [out, in] on this rank, or [experts, out, in]."""
        stack = () if self.experts is None else ((self.experts,),)
        return ShardSpec(dims=(*stack, self.out_sections, (self.in_section,)), stacked_experts=bool(stack))

    @property
    def _bias_shard(self) -> ShardSpec:
        """Of a bias [out] on this rank, or [experts, out]."""
        stack = () if self.experts is None else ((self.experts,),)
        return ShardSpec(dims=(*stack, self.out_sections), stacked_experts=bool(stack))

    @property
    def input_scale(self) -> torch.Tensor | None:
        """Scale [] float32 with which `forward` also takes its input as float8; None: only in the model's dtype."""
        return self.method.input_scale(self)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return self.method.apply(self, x, self.bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features_local}, out={self.out_features_local}, bias={self.bias is not None}"


class ReplicatedLinear(Linear):
    """Every rank holds the whole weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool, *, config: ModelConfig, name: str) -> None:
        super().__init__(whole(in_features), (whole(out_features),), bias, config=config, name=name)


class ColumnParallelLinear(Linear):
    """Each rank computes its part of the outputs."""

    def __init__(self, in_features: int, out_features: int, bias: bool, *, config: ModelConfig, name: str) -> None:
        mapping = config.mapping
        section = split(out_features, mapping.tp_size, mapping.tp_rank, what=f"the output size of {name}")
        super().__init__(whole(in_features), (section,), bias, config=config, name=name)


class MergedColumnParallelLinear(Linear):
    """Several projections of one input in one product, e.g. gate and up; each is split over the ranks by itself."""

    def __init__(
        self, in_features: int, out_features: dict[str, int], bias: bool, *, config: ModelConfig, name: str
    ) -> None:
        tp, rank = config.mapping.tp_size, config.mapping.tp_rank
        sections = fused(
            [split(size, tp, rank, what=f"the {key} size of {name}", name=key) for key, size in out_features.items()]
        )
        super().__init__(whole(in_features), sections, bias, config=config, name=name)

    def gated(
        self, x: torch.Tensor, activation: GatedActivation, out_scale: torch.Tensor | None, ctx: ForwardContext
    ) -> torch.Tensor:
        """Returns ``activation(forward(x), out_scale)`` [T, out / 2], in the product's kernel where that is faster."""
        gate = fusible_gate(activation, out_scale)
        done = None if gate is None else self.method.apply_fused(self, x, self.bias, gate)
        return activation(self(x, ctx), out_scale) if done is None else done


class QKVParallelLinear(Linear):
    """Query, key and value projections in one product, split by heads.

    With fewer key/value heads than ranks, each key/value head lives on several ranks. With ``has_gate`` there is one
    more number for each of the queries', which sources hold head by head: a query, then its gate.
    """

    def __init__(self, bias: bool, has_gate: bool = False, *, config: ModelConfig, name: str) -> None:
        tp, rank, head_dim = config.mapping.tp_size, config.mapping.tp_rank, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sections = [
            split_heads(heads, head_dim, tp, rank, name="q", groups=heads if has_gate else kv_heads),
            split_heads(kv_heads, head_dim, tp, rank, name="k"),
            split_heads(kv_heads, head_dim, tp, rank, name="v"),
        ]
        if has_gate:
            sections.append(split_heads(heads, head_dim, tp, rank, name="gate"))
        super().__init__(whole(config.hidden_size), fused(sections), bias, config=config, name=name)

    def is_fused(self, rows: int) -> bool:
        """Whether `rotated` may be asked with so many rows."""
        return self.plan.fused(rows, self.out_features_local, RopeCacheAfter) is not None

    def rotated(self, x: torch.Tensor, after: RopeCacheAfter) -> torch.Tensor | None:
        """Returns queries [T, Hq * D] and stores keys and values; None, with nothing done, where `forward` is right."""
        return self.method.apply_fused(self, x, self.bias, after)


@dataclass(slots=True)
class Stream:
    """The residual stream, offered to half a layer: whoever adds it to the half's result takes it."""

    left: torch.Tensor | None  # [T, H] until it is taken


class RowParallelLinear(Linear):
    """Each rank multiplies its part of the inputs; the sum over the ranks is the result. Bias is added once.

    Without ``reduce`` the result is this rank's summand: whoever calls it adds it to others and sums once. A stream
    [T, out] is taken where the product's kernel adds it, and stays where that is not faster or not possible.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, config: ModelConfig, name: str, reduce: bool = True
    ) -> None:
        mapping = config.mapping
        section = split(in_features, mapping.tp_size, mapping.tp_rank, what=f"the input size of {name}")
        super().__init__(section, (whole(out_features),), bias, config=config, name=name)
        self.adds_bias = mapping.tp_rank == 0
        self.reduce = reduce
        self.adds_stream = mapping.tp_size == 1 and not bias

    def forward(self, x: torch.Tensor, ctx: ForwardContext, stream: Stream | None = None) -> torch.Tensor:
        if stream is not None and stream.left is not None and self.adds_stream:
            total = self.method.apply_fused(self, x, None, AddAfter(stream.left))
            if total is not None:
                stream.left = None
                return total
        out = self.method.apply(self, x, self.bias if self.adds_bias else None)
        return ctx.tp.all_reduce(out) if self.reduce else out
