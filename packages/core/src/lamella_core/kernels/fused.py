"""What a matmul kernel may compute besides its product: the norm before it, the gated activation after it.

With few rows a product takes about as long as reading its weight, and a kernel boundary is a noticeable part of that.
A kernel offers these through `lamella_core.kernels.gpu_matmul.GpuMatmul.fused`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lamella_core.kernels.matmul import Scales


@dataclass(frozen=True, slots=True)
class RmsNormBefore:
    """x [M, K] stands for the root-mean-square norm of x + residual, see `lamella_core.kernels.ops.rms_norm`.

    With a float8 weight the normed rows are quantized by the product's static scale of x.
    """

    weight: Tensor  # [K], of x's dtype
    eps: float
    residual: Tensor | None  # [M, K], of x's dtype
    unit_offset: bool = False  # multiply by 1 + weight instead


@dataclass(frozen=True, slots=True)
class SiluGateAfter:
    """The product's columns are [gate, up]; the result is silu(gate) * up, see `lamella_core.kernels.ops.silu_and_mul`.

    The product is rounded to its dtype first, as if it were stored.
    """

    out_scale: Tensor | None  # [] float32: the result comes as float8, divided by it


# (x [M, K], weight [N, K], bias [N], scales, norm, gate) -> the result, [M, N] or [M, N / 2] with a gate, and the sum
# x + residual [M, K] (x itself without a norm or residual). None: not served, nothing was computed.
FusedFunction = Callable[
    [Tensor, Tensor, "Tensor | None", "Scales | None", "RmsNormBefore | None", "SiluGateAfter | None"],
    "tuple[Tensor, Tensor] | None",
]
