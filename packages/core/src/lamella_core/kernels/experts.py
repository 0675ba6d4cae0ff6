"""What the grouped product over a rank's experts takes, see `lamella_core.kernels.triton.moe`.

Shape legend: E experts on this rank, H hidden size, I inner size of an expert on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Swiglu:
    """A gated activation that kernels compute after the product of gate and up, in float32.

    ``gate * sigmoid(alpha * gate) * (up + offset)``, after gate was limited to ``limit`` and up to +-``limit``.
    """

    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class ExpertProjection:
    """One linear projection of all experts of a rank."""

    weight: Tensor  # [E, N, K], float or float8
    bias: Tensor | None = None  # [E, N]
    weight_scale: Tensor | None = None  # float32 [E] or [E, N], of float8 weights
    input_scale: Tensor | None = None  # float32 [E] of inputs to float8 weights; None: one per token, as they come


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The MLPs of a rank's experts; where they have no gate, the first projection is [E, I, H] and so is its result."""

    num_experts: int  # of the model, on all ranks
    first: int  # number of this rank's first
    gate_up: ExpertProjection  # [E, 2 I, H], gate first
    down: ExpertProjection  # [E, H, I]
    activation: Callable[[Tensor], Tensor]  # [T, 2 I] -> [T, I]
    gate: Swiglu | None  # the same activation, where kernels have it
    scale_inputs: bool = False  # a token's weight multiplies the input of an expert instead of its result

    @property
    def held(self) -> int:
        """E."""
        return self.gate_up.weight.shape[0]
