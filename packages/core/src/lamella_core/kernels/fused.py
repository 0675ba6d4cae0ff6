"""What a matmul kernel may compute besides its product, on what it holds before it would be stored.

With few rows a product takes about as long as reading its weight, and a kernel boundary is a noticeable part of that;
with many, what is not stored need not be read again. A kernel offers it through `fused`, see
`lamella_core.kernels.gpu_matmul.GpuMatmul`. The product is rounded to its dtype first, as if it were stored: results
are those of separate kernels, but for the order of a product's sums. Only `AddAfter` rounds once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from lamella_core.context import KvPlace
    from lamella_core.kernels.matmul import Scales
    from lamella_core.layers.rotary import Rotation

# Rows from which a sum in the product saves time: 2 % of a layer of Llama-3.1-8B in float8 at 8,192 rows on an H100,
# nothing at 1,536, where products and stream (25 MB) stay in the GPU's second-level cache (50 MB).
LEAST_ADDED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class SiluGateAfter:
    """The product's columns are [gate, up]; the result is silu(gate) * up, see `lamella_core.kernels.ops.silu_and_mul`.

    The result is [M, N / 2].
    """

    out_scale: Tensor | None  # [] float32: the result comes as float8, divided by it


@dataclass(frozen=True, slots=True)
class RopeCacheAfter:
    """The product's columns are heads: Hq of queries, Hkv of keys, Hkv of values, each of D numbers.

    Queries are the result, rotated: [M, Hq * D]. Rotated keys, and values, go to the cache and nowhere else. Rows
    without a slot write nothing there.
    """

    num_heads: int  # Hq
    place: KvPlace  # of M tokens
    rotation: Rotation | None  # of M tokens; None: nothing is rotated


@dataclass(frozen=True, slots=True)
class AddAfter:
    """The result is the product plus the summand, [M, N] in new memory, rounded once."""

    summand: Tensor  # [M, N] of the product's dtype


FusedStep: TypeAlias = SiluGateAfter | RopeCacheAfter | AddAfter
# (x [M, K], weight [N, K], bias [N], scales, after) -> see there. None: not served, nothing was computed or written.
FusedFunction = Callable[[Tensor, Tensor, "Tensor | None", "Scales | None", FusedStep], "Tensor | None"]
# (rows M, outputs N, class of the step, whether there is neither a bias nor a scale per output) -> whether
# the function is worth calling; quick, before anything is computed.
FusionOffer = Callable[[int, int, type, bool], bool]
