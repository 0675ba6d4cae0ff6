"""Token embedding and output layer, both split over the vocabulary; tied ones share a single tensor.

The vocabulary is padded to a multiple of the tensor-parallel size; padding rows are zero and their logits are dropped.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.kernels.cpu.ops import panel_rows
from lamella_core.kernels.matmul import MatmulPlan, default_plan
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.sharding import ShardSpec, replicated, split_padded, whole


class VocabMatrix(nn.Module):
    """weight [V on this rank, embedding_size]; ``plan`` says in which layout, and how hidden states are multiplied."""

    weight: Parameter
    plan: MatmulPlan

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mapping = config.mapping
        width = config.embedding_size or config.hidden_size
        self.rows = split_padded(config.vocab_size, mapping.tp_size, mapping.tp_rank)
        self.weight = empty_parameter(ShardSpec(dims=((self.rows,), (whole(width),))), config.torch_dtype)
        self.plan = default_plan(
            config.torch_dtype,
            self.rows.padded_length,
            width,
            batch_invariant=config.torch_dtype == torch.float32,
            layout="rows",
        )


class VocabParallelEmbedding(VocabMatrix):
    """Token ids [T] -> rows [T, H]; each rank looks up the ids it holds and the ranks' results are summed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.scale = torch.tensor(config.embedding_scale, dtype=config.torch_dtype, device="cpu").item()

    def forward(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        rows = self._embed(ids, ctx)
        return rows if self.scale == 1.0 else rows * self.scale

    def _embed(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        if self.rows.length == self.rows.size:
            return self._lookup(ids)
        local = ids - self.rows.start
        held = (local >= 0) & (local < self.rows.length)
        found = self._lookup(torch.where(held, local, 0))
        return ctx.tp.all_reduce(torch.where(held.unsqueeze(-1), found, 0))

    def _lookup(self, local: torch.Tensor) -> torch.Tensor:
        if self.plan.layout == "panel16":
            return panel_rows(self.weight, local)
        return F.embedding(local, self.weight)


class LMHead(nn.Module):
    """Hidden states [R, H] -> logits [R, vocab_size], scaled and capped by the config, gathered from all ranks.

    With ``tied_to`` it owns nothing and multiplies by the embedding's weight.
    """

    def __init__(self, config: ModelConfig, tied_to: VocabMatrix | None = None, bias: bool = False) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.scale, self.softcap = config.logit_scale, config.logit_softcap
        self.bias: Parameter | None = None
        if tied_to is None:
            own = VocabMatrix(config)
            self.weight, self.plan, self.rows = own.weight, own.plan, own.rows
        else:
            self.rows = tied_to.rows
        self._tied = (tied_to,) if tied_to is not None else ()  # in a tuple: not a submodule, its weight counts once
        if bias:
            self.bias = empty_parameter(ShardSpec(dims=((self.rows,),)), config.torch_dtype)

    def forward(self, hidden: torch.Tensor, ctx: ForwardContext, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        holder = self._tied[0] if self._tied else self
        logits = holder.plan.run(hidden, holder.weight, self.rows.padded_length, self.bias).to(dtype)
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return ctx.tp.all_gather(logits, dim=-1)[:, : self.vocab_size]


class PositionEmbedding(nn.Module):
    """Learned absolute positions [T] -> rows [T, H]; every rank holds the whole table.

    Position p is row p + ``offset``.
    """

    weight: Parameter

    def __init__(self, num_positions: int, hidden_size: int, dtype: torch.dtype, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset
        self.weight = empty_parameter(replicated(num_positions + offset, hidden_size), dtype)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return F.embedding(positions + self.offset if self.offset else positions, self.weight)
