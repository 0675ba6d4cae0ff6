"""Mixture of experts: a router picks experts per token; experts are split over ranks by number and by inner size.

A token's result is the sum over its experts in rising order of their numbers, each computed with row-independent
products, so that in float32 it does not depend on the tokens computed with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from lamella_core.checks import check_integer
from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.kernels import ops
from lamella_core.kernels import triton as triton_kernels
from lamella_core.kernels.experts import ExpertStack
from lamella_core.layers.activation import Activation, gated, sigmoid, swiglu_of
from lamella_core.layers.linear import Linear, ReplicatedLinear, Stream
from lamella_core.layers.mlp import FeedForward, GatedMLP
from lamella_core.layers.sharding import Section, fused, split, whole
from lamella_core.quantization.config import QuantConfig

MOST_EXPERTS = 10_000


class Router(nn.Module):
    """Scores every expert for a token and chooses ``top_k`` of them; subclasses say how in `choose`.

    It is never quantized: it is small, and another choice of experts changes more than any rounding.
    """

    def __init__(self, config: ModelConfig, num_experts: int, top_k: int, *, name: str, bias: bool = False) -> None:
        super().__init__()
        check_integer("num_local_experts", num_experts, 1, MOST_EXPERTS)
        check_integer("num_experts_per_tok", top_k, 1, num_experts, " (the number of experts)")
        self.top_k = top_k
        self.gate = _unquantized_gate(config, num_experts, name, bias)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns expert numbers [T, top_k] int64 and their float32 weights [T, top_k]."""
        return self.choose(self.gate(x, ctx).float())

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `forward` returns, from scores [T, experts] float32."""
        raise NotImplementedError


class TopKRouter(Router):
    """Softmax over all experts, the ``top_k`` largest, optionally rescaled to sum to one."""

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        top_k: int,
        *,
        name: str,
        bias: bool = False,
        renormalize: bool = True,
    ) -> None:
        super().__init__(config, num_experts, top_k, name=name, bias=bias)
        self.renormalize = renormalize

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        return self.choose(self.gate(x, ctx))

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.top_k_softmax(scores, self.top_k, self.renormalize)


class SigmoidRouter(Router):
    """The ``top_k`` largest scores, each weighted by its own sigmoid (Llama 4, 2025)."""

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best, experts = scores.topk(self.top_k, dim=-1)
        return experts, sigmoid(best)


class SparseMixerRouter(Router):
    """SparseMixer (Liu et al. 2024) as it routes without training: the best expert, then the best of the others.

    Each is weighted by its softmax among the experts that are left and whose scores are near its own: whose relative
    distance is at most twice ``jitter``.
    """

    def __init__(self, config: ModelConfig, num_experts: int, top_k: int, *, name: str, jitter: float) -> None:
        super().__init__(config, num_experts, top_k, name=name)
        self.jitter = jitter

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, experts, weights = scores, [], []
        for _ in range(self.top_k):
            best, expert = left.max(dim=-1, keepdim=True)
            is_far = (best - scores) / scores.abs().maximum(best) > 2 * self.jitter
            near = left.masked_fill(is_far, -torch.inf)
            weights.append(torch.softmax(near, dim=-1).gather(-1, expert))
            experts.append(expert)
            left = left.scatter(-1, expert, -torch.inf)
        return torch.cat(experts, dim=-1), torch.cat(weights, dim=-1)


def _unquantized_gate(config: ModelConfig, outputs: int, name: str, bias: bool = False) -> ReplicatedLinear:
    plain = replace(config, quantization=QuantConfig())
    return ReplicatedLinear(config.hidden_size, outputs, bias, config=plain, name=f"{name}.gate")


class GatedExperts(nn.Module):
    """The gated MLPs of this rank's experts, stacked: parameters [experts on this rank, out, in].

    On a GPU all experts are computed together, without the host's knowing which tokens go where; elsewhere one after
    the other.

    Args:
        config: of the whole model.
        num_experts: of the whole model.
        inner: inner size of one expert.
        name: dotted path of this module.
        scale_inputs: a token's weight multiplies what an expert reads, not what it returns.
        bias: whether both projections have one.
        activation: of what the first projection returns; None: the gated form of the config's.
    """

    parts: ClassVar[tuple[str, ...]] = ("gate", "up")  # of the first projection, side by side

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        inner: int,
        *,
        name: str,
        scale_inputs: bool = False,
        bias: bool = False,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        mapping = config.mapping
        self.scale_inputs = scale_inputs
        self.num_experts = num_experts
        self.local_experts = mapping.ep_experts(num_experts)
        held = len(self.local_experts)
        stack = Section(num_experts, self.local_experts.start, held, held)
        tp, rank, what = mapping.moe_tp_size, mapping.moe_tp_rank, f"the expert size of {name}"
        hidden = whole(config.hidden_size)
        both = fused([replace(split(inner, tp, rank, what=what, name=key), group=1) for key in self.parts])
        self.gate_up_proj = Linear(hidden, both, bias, config=config, name=f"{name}.gate_up_proj", experts=stack)
        self.activation: Activation = activation or gated(config.hidden_act)
        down = split(inner, tp, rank, what=what)
        self.down_proj = Linear(down, (hidden,), bias, config=config, name=f"{name}.down_proj", experts=stack)
        self.adds_bias = rank == 0  # of down_proj: ranks that share an expert sum their parts

    @property
    def waits_for_device(self) -> bool:
        """Whether `forward` on a GPU reads how many tokens each expert got, which no recorded step can."""
        return not triton_kernels.is_available()

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns this rank's part of the weighted sum over each token's experts: [T, H].

        Args:
            x: [T, H].
            experts: numbers of each token's experts, [T, top_k].
            weights: of those experts, [T, top_k] float32.
        """
        if x.is_cuda and triton_kernels.is_available():
            from lamella_core.kernels.triton.moe import gated_experts

            return gated_experts(x, experts, weights, self.stack())
        return self._one_by_one(x, experts, weights)

    def stack(self) -> ExpertStack:
        """Returns the experts as kernels take them."""
        gate_up, down = self.gate_up_proj, self.down_proj
        return ExpertStack(
            self.num_experts,
            self.local_experts.start,
            gate_up.method.stacked(gate_up, gate_up.bias),
            down.method.stacked(down, down.bias if self.adds_bias else None),
            self.activation,
            swiglu_of(self.activation),
            self.scale_inputs,
        )

    def _one_by_one(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        top_k = experts.shape[1]
        by_expert, order = experts.flatten().sort(stable=True)  # assignments (token, choice) in order of experts
        held = torch.arange(self.local_experts.start, self.local_experts.stop + 1, device=x.device)
        bounds = torch.searchsorted(by_expert, held).tolist()
        tokens, scale = order // top_k, weights.flatten()[order].unsqueeze(-1)
        out = torch.zeros_like(x)
        for local in range(len(self.local_experts)):
            begin, end = bounds[local], bounds[local + 1]
            if begin < end:
                rows, factor = tokens[begin:end], scale[begin:end]
                given = x[rows] * factor.to(x.dtype) if self.scale_inputs else x[rows]
                inner = self.activation(_project(self.gate_up_proj, given, local))
                result = _project(self.down_proj, inner, local, adds_bias=self.adds_bias)
                out.index_add_(0, rows, result if self.scale_inputs else (result * factor).to(x.dtype))
        return out


def _project(layer: Linear, x: torch.Tensor, expert: int, *, adds_bias: bool = True) -> torch.Tensor:
    """Returns x [T, in] times the weight of one of this rank's experts, plus its bias: [T, out]."""
    bias = layer.bias[expert] if layer.bias is not None and adds_bias else None
    return layer.method.apply(layer, x, bias, expert)


class SharedExpert(GatedMLP):
    """An expert that every token goes to; returns this rank's summand [T, H], for `MoE` to add to the others'.

    With ``is_gated`` its result is multiplied by the sigmoid of a learned score of the token.
    """

    takes_stream = False  # `MoE` adds more to it

    def __init__(self, config: ModelConfig, *, inner: int, name: str, is_gated: bool = False) -> None:
        super().__init__(config, name=name, inner=inner, reduce=False)
        self.gate = _unquantized_gate(config, 1, name) if is_gated else None

    def forward(self, x: torch.Tensor, ctx: ForwardContext, stream: Stream | None = None) -> torch.Tensor:
        out = super().forward(x, ctx)
        return out if self.gate is None else sigmoid(self.gate(x, ctx)) * out


class MoE(FeedForward):
    """Router, experts and perhaps a shared one; the ranks' parts are summed: [T, H] -> [T, H].

    ``router`` is by default a `TopKRouter`, to which ``renormalize`` goes. ``experts`` are by default `GatedExperts`,
    to which ``inner``, ``scale_inputs``, ``bias`` and ``activation`` go. ``shared`` returns its rank's summand.
    """

    def __init__(  # noqa: PLR0913 - by keyword, most models leave most out
        self,
        config: ModelConfig,
        *,
        num_experts: int,
        top_k: int,
        inner: int,
        name: str,
        renormalize: bool = True,
        router: Router | None = None,
        experts: GatedExperts | None = None,
        shared: FeedForward | None = None,
        scale_inputs: bool = False,
        bias: bool = False,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.router = router or TopKRouter(config, num_experts, top_k, name=f"{name}.router", renormalize=renormalize)
        self.experts = experts or GatedExperts(
            config,
            num_experts,
            inner,
            name=f"{name}.experts",
            scale_inputs=scale_inputs,
            bias=bias,
            activation=activation,
        )
        self.shared = shared
        self.reduce = True

    def leave_sum(self) -> bool:
        self.reduce = False
        return True

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        out = self.experts(x, *self.router(x, ctx))
        if self.shared is not None:
            out = out + self.shared(x, ctx)
        return ctx.tp.all_reduce(out) if self.reduce else out
