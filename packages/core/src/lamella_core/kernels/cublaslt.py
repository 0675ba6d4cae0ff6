"""Matmul kernels that are algorithms of cuBLASLt.

torch takes the first algorithm that the library's heuristics propose, which is not always the fastest of them. A build
times the others and records the best under a name (`kernel_name`) that holds the algorithm itself.
"""

from __future__ import annotations

import base64
import binascii
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lamella_core.errors import ConfigError
from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.cublaslt_library import (
    ALGORITHM_BYTES,
    DATA_TYPES,
    Library,
    Prepared,
    Product,
    library,
)
from lamella_core.kernels.fused import AddAfter, FusedStep

if TYPE_CHECKING:
    import torch

    from lamella_core.kernels.matmul import Scales

PREFIX = "cublaslt:"  # of kernel names
MOST_PREPARED = 2048  # products, each for one number of rows, that are kept ready


@functools.lru_cache(maxsize=MOST_PREPARED)
def _prepared(loaded: Library, algorithm: bytes | None, product: Product, device: int | None) -> Prepared | None:
    """Returns `Library.prepare`'s answer for the current GPU, ``device``; checked once while it is kept.

    Without an algorithm it is of the library's first proposal.
    """
    if algorithm is None:
        algorithm = next(iter(loaded.proposals(product, 1)), None)
    return None if algorithm is None else loaded.prepare(algorithm, product)


@dataclass(frozen=True)
class CublasLtMatmul:
    """The `lamella_core.kernels.matmul.MatmulKernel` of one algorithm of one version of the library.

    Products that the algorithm does not serve are torch's: with a bias, with scales per row or output, with operands
    that do not lie as the library expects, or of a number of rows that its own check refuses.
    """

    name: str
    version: int
    algorithm: bytes
    layout: str = "rows"
    batch_invariant: bool = False
    device: str = "cuda"

    def available(self, dtype: torch.dtype, n: int, k: int) -> bool:
        """Whether the library here is the one that proposed the algorithm, and serves weights of dtype [n, k]."""
        if dtype not in DATA_TYPES or n <= 0 or k <= 0 or n % 16 or k % 16:
            return False
        if dtype in gpu_matmul.FP8 and gpu_matmul.capability() < gpu_matmul.FP8_CAPABILITY:
            return False
        loaded = library()
        return loaded is not None and loaded.version == self.version and loaded.is_ready()

    def __call__(self, x: Tensor, w: Tensor, n: int, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
        """Return x [M, K] times w [N, K] transposed plus bias: [M, N]; all on the current GPU."""
        product = _product(self.algorithm, x, w, bias, scales)
        if product is not None:
            return product
        if x.dtype in gpu_matmul.FP8:
            return gpu_matmul.cublas_fp8(x, w, bias, scales)
        return gpu_matmul.cublas(x, w, bias)

    def fused(
        self, x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None, after: FusedStep
    ) -> Tensor | None:
        """Sums by the same algorithm; see `lamella_core.kernels.fused.FusedFunction`."""
        if isinstance(after, AddAfter):
            return added(x, w, bias, scales, after, self.algorithm)
        return gpu_matmul.many_rows_fused(x, w, bias, scales, after)

    def offers(self, rows: int, outputs: int, step: type, is_plain: bool) -> bool:
        """See `lamella_core.kernels.fused.FusionOffer`."""
        return gpu_matmul.many_rows_offer(rows, outputs, step, is_plain)


def added(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    scales: Scales | None,
    after: AddAfter,
    algorithm: bytes | None = None,
) -> Tensor | None:
    """Returns x [M, K] times w [N, K] transposed plus the summand, or None; see `AddAfter`.

    Without an algorithm the library's first proposal computes it: `torch.addmm` would copy the summand before. The
    first call on a GPU must not be in a graph that is recorded, see `Library.is_ready`.
    """
    loaded = library()
    if loaded is None or not loaded.is_ready():
        return None
    return _product(algorithm, x, w, bias, scales, after.summand)


def _product(
    algorithm: bytes | None,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    scales: Scales | None,
    summand: Tensor | None = None,
) -> Tensor | None:
    """Returns x [M, K] times w [N, K] transposed plus a summand [M, N]; None where the library does not serve that."""
    loaded = library()
    if loaded is None or bias is not None or not x.shape[0] or not _fits(x, w, scales, loaded.alignment):
        return None
    product = Product(x.shape[0], w.shape[0], x.shape[1], x.dtype, x.dtype if scales is None else scales.out_dtype)
    if summand is not None and not _is_like_result(summand, product, loaded.alignment):
        return None
    prepared = _prepared(loaded, algorithm, product, x.device.index)
    return None if prepared is None else prepared.run(x, w, scales, summand)


def _is_like_result(summand: Tensor, product: Product, alignment: int) -> bool:
    is_same = summand.shape == (product.m, product.n) and summand.dtype == product.out_dtype
    return is_same and summand.is_contiguous() and not summand.data_ptr() % alignment


def _fits(x: Tensor, w: Tensor, scales: Scales | None, alignment: int) -> bool:
    is_fp8 = x.dtype in gpu_matmul.FP8
    if x.dtype not in DATA_TYPES or w.dtype != x.dtype or is_fp8 != (scales is not None):
        return False
    if scales is not None and (
        scales.x.numel() != 1 or scales.w.numel() != 1 or scales.out_dtype not in gpu_matmul.HALVES
    ):
        return False
    return x.is_contiguous() and w.is_contiguous() and not (x.data_ptr() % alignment or w.data_ptr() % alignment)


def kernel_name(version: int, algorithm: bytes) -> str:
    """Returns what engines record: "cublaslt:", the library's version, ":" and the algorithm in base64."""
    return f"{PREFIX}{version}:{base64.b64encode(algorithm).decode()}"


@functools.lru_cache(maxsize=1024)
def kernel_of(name: str) -> CublasLtMatmul:
    """Returns the kernel that `kernel_name` names, whether or not this machine can run it.

    Raises:
        ConfigError: no such name.
    """
    version, _, text = name.removeprefix(PREFIX).partition(":")
    try:
        algorithm = base64.b64decode(text, validate=True)
    except binascii.Error:
        algorithm = b""
    if not name.startswith(PREFIX) or not (version.isascii() and version.isdigit()):
        algorithm = b""
    if len(algorithm) != ALGORITHM_BYTES:
        raise ConfigError(
            f"matmul kernel {name!r} is no algorithm of cuBLASLt; it must be '{PREFIX}VERSION:' and "
            f"{ALGORITHM_BYTES} bytes in base64. Build the engine again"
        )
    return CublasLtMatmul(name, int(version), algorithm)
