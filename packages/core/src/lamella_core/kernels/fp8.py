"""Float8 (e4m3fn, Micikevicius et al. 2022): quantizing activations, and products of float8 values on a CPU.

A float8 number stands for itself times a scale: static, one for a whole tensor and known beforehand, or dynamic, one
per token and found as the tokens come. Quantized values are round(clamp(x / scale, -448, 448)), in float32, to nearest
even; NaN stays NaN. The functions here are what the CUDA kernels are compared with.

Legend: T or M rows (tokens), K input features, N output features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lamella_core.kernels import triton as triton_kernels
from lamella_core.kernels.cpu import ops

if TYPE_CHECKING:
    from lamella_core.kernels.matmul import Scales

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
LEAST_AMAX = 1e-10  # of a token, so that the scale of a zero row is not zero
_ROWS_WIDENED = 128  # of a weight at a time: they stay in the cache


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Returns x [T, K] divided by ``scale`` ([] or [T, 1], float32) as float8 [T, K], saturated."""
    if x.is_cuda and scale.numel() == 1 and triton_kernels.is_available():
        from lamella_core.kernels.triton.quantize import quantize_fp8

        return quantize_fp8(x, scale)
    return (x.float() / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x [T, K] as float8 [T, K] and the scales of its rows [T, 1] float32: their largest magnitude over 448."""
    if x.is_cuda and triton_kernels.is_available():
        from lamella_core.kernels.triton.quantize import quantize_fp8_per_token

        return quantize_fp8_per_token(x)
    scales = x.float().abs().amax(dim=-1, keepdim=True).clamp_min_(LEAST_AMAX) / FLOAT8_MAX
    return quantize(x, scales), scales


def simulate(x: Tensor, scale: Tensor) -> Tensor:
    """Returns x (any shape) rounded to what float8 with ``scale`` [] keeps of it, in x's dtype."""
    return ((x.float() / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).float() * scale).to(x.dtype)


def widen(values: Tensor) -> Tensor:
    """Returns float8 values on the CPU as float32, several times faster than torch's own conversion."""
    return _table().index_select(0, values.reshape(-1).view(torch.uint8).int()).view(values.shape)


@functools.cache
def _table() -> Tensor:
    """Returns the float32 value of each of the 256 bit patterns."""
    return torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()


def linear(x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales) -> Tensor:
    """Returns x [M, K] times w [N, K] transposed, both float8, accumulated in float32, scaled, plus bias: [M, N].

    With the native kernels a row's bits are independent of the rows computed with it.
    """
    wide, rows = widen(x), w.shape[0]
    out = torch.empty(x.shape[0], rows, dtype=torch.float32)
    for start in range(0, rows, _ROWS_WIDENED):
        stop = min(start + _ROWS_WIDENED, rows)
        out[:, start:stop] = ops.gemv_rows(wide, widen(w[start:stop]))
    out *= scales.x * scales.w
    if bias is not None:
        out += bias
    return out.to(scales.out_dtype)


@dataclass(frozen=True)
class Fp8Upcast:
    """The CPU's float8 `lamella_core.kernels.matmul.MatmulKernel`: weights are widened as they are multiplied by."""

    name: str = "fp8_upcast"
    layout: str = "rows"
    batch_invariant: bool = True
    device: str = "cpu"

    def available(self, dtype: torch.dtype, n: int, k: int) -> bool:
        """Whether the weight is of float8."""
        return dtype == FLOAT8 and n > 0 and k > 0

    def __call__(self, x: Tensor, w: Tensor, n: int, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
        """Returns [M, n] in ``scales.out_dtype``; see `linear`.

        Raises:
            ValueError: there are no scales, or an operand is not float8.
        """
        if scales is None or x.dtype != FLOAT8 or w.dtype != FLOAT8:
            raise ValueError(f"a float8 product needs scales and float8 operands; x is {x.dtype}, the weight {w.dtype}")
        return linear(x, w, bias, scales)
