"""What a matmul kernel may compute besides its product: the gated activation after it.

With few rows a product takes about as long as reading its weight, and a kernel boundary is a noticeable part of that.
A kernel offers it through `lamella_core.kernels.gpu_matmul.GpuMatmul.gated`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lamella_core.kernels.matmul import Scales


@dataclass(frozen=True, slots=True)
class SiluGateAfter:
    """The product's columns are [gate, up]; the result is silu(gate) * up, see `lamella_core.kernels.ops.silu_and_mul`.

    The product is rounded to its dtype first, as if it were stored.
    """

    out_scale: Tensor | None  # [] float32: the result comes as float8, divided by it


# (x [M, K], weight [N, K], bias [N], scales, gate) -> [M, N / 2]. None: not served, nothing was computed.
GatedFunction = Callable[[Tensor, Tensor, "Tensor | None", "Scales | None", SiluGateAfter], "Tensor | None"]
