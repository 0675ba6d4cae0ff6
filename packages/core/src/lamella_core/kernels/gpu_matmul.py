"""CUDA matmul kernels: NVIDIA's libraries through torch, and Triton kernels for few rows.

All read weights in the plain layout [N, K], so that a weight serves every kernel and every GPU. None promises that a
row's bits are independent of the rows computed with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella_core.kernels import triton as triton_kernels
from lamella_core.kernels.fused import (
    LEAST_ADDED_ROWS,
    AddAfter,
    FusedFunction,
    FusedStep,
    FusionOffer,
    RopeCacheAfter,
    SiluGateAfter,
)

if TYPE_CHECKING:
    from lamella_core.kernels.matmul import Scales

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn,)
FP8_CAPABILITY = (8, 9)  # Ada: float8 conversions and matrix units
MOST_GEMV_ROWS = 16  # gemv.MOST_ROWS, known without importing triton
MOST_GATED_ROWS = {1: 2, 2: 4}  # bytes per weight number -> rows up to which a gate in the product saves time
# Rows up to which keys and values are stored in the product: one sequence through Llama-3.1-8B takes 3.05 instead of
# 3.09 ms per token in float8 on an H100, a layer 152.3 instead of 152.8 us in bfloat16. At 4 bfloat16 rows some
# keys differ from the separate kernel's by 7e-4 of the largest value.
MOST_STORED_ROWS = 1

Function = Callable[[Tensor, Tensor, "Tensor | None", "Scales | None"], Tensor]


@functools.cache
def capability() -> tuple[int, int]:
    """Returns the compute capability of the current GPU, (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


@dataclass(frozen=True)
class GpuMatmul:
    """A CUDA kernel described by data.

    Attributes:
        name: key in `KERNELS`.
        dtypes: of weights and inputs.
        function: takes x, w, bias, scales.
        multiple: what N and K must be multiples of.
        fp8_capability: compute capability that float8 weights need.
        most_rows: rows it takes; None: any number.
        needs_triton: whether triton must be installed.
        fused: computes what follows the product too, where that saves time.
        offers: when ``fused`` may; None: always.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    function: Function
    multiple: tuple[int, int] = (1, 1)
    fp8_capability: tuple[int, int] = FP8_CAPABILITY
    most_rows: int | None = None
    needs_triton: bool = False
    fused: FusedFunction | None = None
    offers: FusionOffer | None = None
    layout: str = "rows"
    batch_invariant: bool = False
    device: str = "cuda"

    def available(self, dtype: torch.dtype, n: int, k: int) -> bool:
        """Whether this machine's GPU serves weights [n, k] of this dtype."""
        least = self.fp8_capability if dtype in FP8 else (1, 0)
        return (
            dtype in self.dtypes
            and n > 0
            and k > 0
            and n % self.multiple[0] == 0
            and k % self.multiple[1] == 0
            and capability() >= least
            and (not self.needs_triton or triton_kernels.is_available())
        )

    def __call__(self, x: Tensor, w: Tensor, n: int, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
        """Return x [M, K] times w transposed plus bias: [M, n]."""
        return self.function(x, w, bias, scales)


def cublas(x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
    """Product of torch; float32 in float32, also where the process allows TensorFloat-32."""
    if x.dtype != torch.float32:
        return F.linear(x, w, bias)
    with _without_tensor_float():
        return F.linear(x, w, bias)


def cublas_stacked(x: Tensor, w: Tensor) -> Tensor:
    """Products of x [B, M, K] and w [B, N, K] transposed: [B, M, N]; float32 as in `cublas`."""
    if x.dtype != torch.float32:
        return torch.bmm(x, w.mT)
    with _without_tensor_float():
        return torch.bmm(x, w.mT)


@contextmanager
def _without_tensor_float() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def cublas_fp8(x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None) -> Tensor:
    """Float8 product of cuBLASLt with fast accumulation: scales of whole tensors, or per row and output.

    Per row and output torch writes bfloat16 alone; other dtypes are scaled after a float32 product.
    """
    scales = required(scales)
    if x.shape[0] == 0:
        return x.new_empty((0, w.shape[0]), dtype=scales.out_dtype)
    if scales.x.numel() == 1 and scales.w.numel() == 1:
        return _scaled_mm(x, w, scales.x, scales.w, bias, scales.out_dtype)
    if scales.out_dtype == torch.bfloat16:
        x_scale, w_scale = _vector(scales.x, x.shape[0])[:, None], _vector(scales.w, w.shape[0])[None, :]
        return _scaled_mm(x, w, x_scale, w_scale, bias, torch.bfloat16)
    one = _one(x.device)
    product = _scaled_mm(x, w, one, one, None, torch.float32).mul_(scales.x).mul_(scales.w)
    return (product if bias is None else product.add_(bias)).to(scales.out_dtype)


def _scaled_mm(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(x, w.t(), x_scale, w_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)


def _vector(scale: Tensor, size: int) -> Tensor:
    """Returns a scale as ``size`` numbers with the strides of a new tensor, which `torch._scaled_mm` checks."""
    if scale.numel() == size:
        return scale.as_strided((size,), (1,))
    return scale.reshape(()).expand(size).clone(memory_format=torch.contiguous_format)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def upcast_fp8(x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None) -> Tensor:
    """Float8 product in the result's dtype, for GPUs and shapes that have no float8 product: slow, and needs room."""
    scales = required(scales)
    dtype = scales.out_dtype
    product = F.linear(x.to(dtype), w.to(dtype)).float().mul_(scales.x).mul_(scales.w)
    return (product if bias is None else product.add_(bias)).to(dtype)


def triton_gemv(x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
    """Few rows at the speed of reading the weight: see `lamella_core.kernels.triton.gemv`."""
    from lamella_core.kernels.triton import gemv

    return gemv.few_rows_matmul(x, w, bias, scales)


def triton_fused_gemv(
    x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None, after: FusedStep
) -> Tensor | None:
    """`triton_gemv` with what follows in the same kernel; see `lamella_core.kernels.fused.FusedFunction`."""
    rows, size = x.shape[0], w.element_size()
    if isinstance(after, SiluGateAfter) and rows > MOST_GATED_ROWS[size]:
        return None
    if isinstance(after, RopeCacheAfter) and rows > MOST_STORED_ROWS:
        return None
    from lamella_core.kernels.triton import gemv

    if gemv.why_not_fused(gemv.default_tile(rows, *w.shape, size), w.shape[0], after) is not None:
        return None
    return gemv.few_rows_matmul(x, w, bias, scales, after=after)


def many_rows_fused(
    x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None, after: FusedStep
) -> Tensor | None:
    """What `cublas` and `cublas_fp8` compute, with what follows; see `lamella_core.kernels.fused.FusedFunction`."""
    from lamella_core.kernels import cublaslt  # which falls back on this module's products
    from lamella_core.kernels.cuda import gated_product

    if isinstance(after, AddAfter):
        return cublaslt.added(x, w, bias, scales, after)
    return gated_product.gated_product(x, w, bias, scales, after) if isinstance(after, SiluGateAfter) else None


def many_rows_offer(rows: int, outputs: int, step: type, is_plain: bool) -> bool:
    """When `many_rows_fused` saves time; see `lamella_core.kernels.fused.FusionOffer`."""
    from lamella_core.kernels.cuda import gated_product

    if step is AddAfter:
        return is_plain and rows >= LEAST_ADDED_ROWS
    return step is SiluGateAfter and is_plain and gated_product.offers(rows, outputs)


def required(scales: Scales | None) -> Scales:
    """Returns the scales, which float8 products cannot do without.

    Raises:
        ValueError: there are none.
    """
    if scales is None:
        raise ValueError("a float8 product needs scales")
    return scales


def gpu_kernels() -> tuple[GpuMatmul, ...]:
    """Returns all CUDA kernels, for `lamella_core.kernels.matmul` to register."""
    return (
        GpuMatmul("cublas", FLOATS, cublas, fused=many_rows_fused, offers=many_rows_offer),
        GpuMatmul("cublas_fp8", FP8, cublas_fp8, multiple=(16, 16), fused=many_rows_fused, offers=many_rows_offer),
        GpuMatmul("torch_fp8_upcast", FP8, upcast_fp8, fp8_capability=(8, 0)),
        GpuMatmul(
            "triton_gemv",
            HALVES + FP8,
            triton_gemv,
            multiple=(1, 16),
            most_rows=MOST_GEMV_ROWS,
            needs_triton=True,
            fused=triton_fused_gemv,
        ),
    )
