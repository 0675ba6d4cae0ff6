"""Gated DeltaNet (Yang et al. 2024) as a token mixer: linear attention that decays and corrects what it remembers.

Queries, keys and values pass a causal convolution and meet in one matrix per head, the state of a sequence. Value heads
are split over the tensor-parallel ranks, and key heads with them; each key head serves neighbouring value heads.

Shape legend: T tokens of this step (packed, no padding), H hidden size; on this rank N value heads of V numbers, and K
key heads of D numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext, StateSpec
from lamella_core.kernels import ops
from lamella_core.layers.activation import silu
from lamella_core.layers.linear import Linear, RowParallelLinear
from lamella_core.layers.mixer import RecurrentMixer
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.rotary import Rotation
from lamella_core.layers.sharding import ShardSpec, fused, replicated, split, split_heads, whole
from lamella_core.layers.state_space import CausalConv
from lamella_core.quantization.config import QuantConfig


@dataclass(frozen=True, kw_only=True)
class DeltaNetSizes:
    """Of the whole layer."""

    key_heads: int  # of queries too
    value_heads: int
    key_dim: int  # D
    value_dim: int  # V
    conv_width: int


class NormThenGate(nn.Module):
    """rms norm of each head times weight, then times silu(gate): [T, N, V] -> [T, N, V]."""

    weight: Parameter  # [V]

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(replicated(size), dtype)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return ops.head_rms_norm(x, self.weight, self.eps) * silu(gate)


class GatedDeltaNet(RecurrentMixer):
    """[T, H] -> [T, H].

    What decays and rates of correction come from is never quantized, and so x comes in the model's dtype.

    Args:
        config: of the whole model.
        index: layer number in the whole model.
        sizes: of the layer.
        name: dotted path of this module.
    """

    a_log: Parameter  # [N] float32
    dt_bias: Parameter  # [N] float32

    def __init__(self, config: ModelConfig, index: int, sizes: DeltaNetSizes, *, name: str) -> None:
        super().__init__()
        tp, rank, dtype = config.mapping.tp_size, config.mapping.tp_rank, config.torch_dtype
        heads = split(sizes.value_heads, tp, rank, what=f"the value heads of {name}")
        q, k = (split_heads(sizes.key_heads, sizes.key_dim, tp, rank, name=key) for key in ("q", "k"))
        v, z = (
            split_heads(sizes.value_heads, sizes.value_dim, tp, rank, name=key, groups=sizes.key_heads)
            for key in ("v", "z")
        )
        b, a = (split_heads(sizes.value_heads, 1, tp, rank, name=key, groups=sizes.key_heads) for key in ("b", "a"))
        hidden, plain = whole(config.hidden_size), replace(config, quantization=QuantConfig())
        self.in_proj = Linear(hidden, fused((q, k, v, z)), False, config=config, name=f"{name}.in_proj")
        self.ba_proj = Linear(hidden, fused((b, a)), False, config=plain, name=f"{name}.ba_proj")
        self.conv = CausalConv(fused((q, k, v)), sizes.conv_width, False, dtype)
        per_head = ShardSpec(dims=((heads,),))
        self.a_log, self.dt_bias = (empty_parameter(per_head, torch.float32) for _ in range(2))
        self.norm = NormThenGate(sizes.value_dim, config.norm_eps, dtype)
        self.out_proj = RowParallelLinear(v.size, config.hidden_size, False, config=config, name=f"{name}.out_proj")
        self.splits = (q.length + k.length + v.length, z.length)
        self.state_spec = StateSpec(
            index,
            shapes=((self.splits[0], sizes.conv_width - 1), (heads.length, sizes.key_dim, sizes.value_dim)),
            dtypes=(dtype, torch.float32),
        )

    def leave_sum(self) -> bool:
        self.out_proj.reduce = False
        return True

    def forward(
        self, x: torch.Tensor, rotation: Rotation | None, ctx: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        step = ctx.recurrent(self.state_spec)
        windows, states = step.pools
        qkv, gate = self.in_proj(x, ctx).split_with_sizes(self.splits, dim=-1)
        b, a = self.ba_proj(x, ctx).chunk(2, dim=-1)
        qkv = ops.causal_conv1d(qkv, self.conv.weight[:, 0], None, windows, step)
        params = ops.DecayParameters(self.a_log, self.dt_bias)
        out = ops.gated_delta_rule(qkv, a, b, params, states, step)
        if rows is not None:
            out, gate = out.index_select(0, rows), gate.index_select(0, rows)
            if not out.shape[0]:
                return x.new_empty(0, self.out_proj.out_features_local, dtype=out.dtype)
        return self.out_proj(self.norm(out, gate.reshape(out.shape)).flatten(1), ctx)
