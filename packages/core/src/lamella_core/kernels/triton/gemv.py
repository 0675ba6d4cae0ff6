"""Products of few rows: x [M, K] times w [N, K] transposed for M up to 16, at the speed of reading w.

Up to 4 rows a program owns BLOCK_N outputs and splits K over all its threads: each thread reads 16 bytes of every
weight row, multiplies and adds in float32, and the threads' sums are combined once, at the end. The next part of the
weight is on its way while the last one is used. With more rows the matrix units multiply, and K is split over the
warps.

The weight does not depend on the kernel before, so its first part is read before that kernel has ended (programmatic
dependent launch); ``ahead`` bytes more of each row are brought to the L2 cache meanwhile.

Shape legend: M rows, N outputs, K inputs; x and w bf16 or fp16, or both float8_e4m3fn with `Scales`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lamella_core.kernels.fused import AddAfter, FusedStep, RopeCacheAfter, SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton.gemv_epilogue import Heads
from lamella_core.kernels.triton.gemv_kernels import matrix_kernel, vector_kernel
from lamella_core.kernels.triton.launch import (
    float8_storage,
    has_float8,
    is_interpreted,
    launch_options,
    next_power_of_2,
    use_pdl,
)

MOST_ROWS = 16
MOST_VECTOR_ROWS = 4
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class VectorTile:
    """How `vector_kernel` divides the work.

    Attributes:
        block_n: outputs per program.
        num_warps: warps per program, all along K.
        ahead: bytes of each weight row that are brought to the L2 cache while the kernel before still runs.
    """

    block_n: int
    num_warps: int
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class MatrixTile:
    """How `matrix_kernel` divides the work.

    Attributes:
        block_n: outputs per program.
        block_k: inputs per warp and turn.
        num_warps: warps per program, all along K.
        num_stages: turns whose weights are in shared memory or on their way to it.
        ahead: as in `VectorTile`.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    ahead: int = 0


def few_rows_matmul(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    scales: Scales | None = None,
    *,
    after: FusedStep | None = None,
    tile: VectorTile | MatrixTile | None = None,
) -> Tensor:
    """Returns x [M, K] times w [N, K] transposed plus bias [N]: [M, N] in x's dtype, or in that of ``scales``.

    Args:
        x: bf16, fp16 or float8_e4m3fn; its rows are contiguous. M is at most `MOST_ROWS`.
        w: of x's dtype, contiguous.
        bias: of the result's dtype.
        scales: of a float8 product.
        after: what follows the product, see there for the result; `why_not_fused` says what that needs.
        tile: how to divide the work; None: `default_tile`. A `VectorTile` takes up to `MOST_VECTOR_ROWS`.

    Raises:
        ValueError: more rows than that, or ``after`` cannot be computed with the tile.
    """
    m, k = x.shape
    n = w.shape[0]
    tile = tile or default_tile(m, n, k, w.element_size())
    _check(m, n, tile, after)
    dtype = x.dtype if scales is None else scales.out_dtype
    out = _empty_output(m, n, dtype, after, x.device)
    if m == 0:
        return out
    common = {
        "K": k,
        "BLOCK_N": tile.block_n,
        "AHEAD": _lines_ahead(tile, k, w.element_size()),
        "DTYPE": _TRITON_DTYPES[dtype],
        "SCALED": scales is not None,
        "SCALE_PER_ROW": scales is not None and scales.x.numel() > 1,
        "SCALE_PER_COL": scales is not None and scales.w.numel() > 1,
        **(_head_arguments(after) if isinstance(after, RopeCacheAfter) else _NO_HEADS),
        "NATIVE_FLOAT8": has_float8(),
        "USE_PDL": use_pdl(),
        "num_warps": tile.num_warps,
        **launch_options(),
    }
    if isinstance(tile, VectorTile):
        _launch_vectors(x, w, out, bias, scales, after if isinstance(after, SiluGateAfter) else None, tile, common)
    else:
        _launch_matrices(x, w, out, bias, scales, tile, common)
    return out


def why_not_fused(tile: VectorTile | MatrixTile, n: int, after: FusedStep) -> str | None:
    """Returns what keeps a program of the tile from what follows a product of ``n`` outputs; None: nothing does."""
    if isinstance(after, SiluGateAfter):
        if isinstance(tile, VectorTile) and tile.block_n > 1 and n % 2 == 0:
            return None
        return f"a gate needs a VectorTile of 2 outputs or more and an even N; they are {tile} and {n}"
    if isinstance(after, AddAfter):
        return "few rows' sums are the norm's, which reads them from the cache"
    head_dim = after.place.k_cache.shape[3]
    if tile.block_n > 1 and head_dim % tile.block_n == 0:
        return None
    return f"heads of {head_dim} need a tile of 2 outputs or more that divides them; it is {tile}"


def _check(m: int, n: int, tile: VectorTile | MatrixTile, after: FusedStep | None) -> None:
    if m > (MOST_VECTOR_ROWS if isinstance(tile, VectorTile) else MOST_ROWS):
        raise ValueError(
            f"{m} rows are more than this kernel takes ({MOST_VECTOR_ROWS} by vectors, {MOST_ROWS} at all)"
        )
    reason = None if after is None else why_not_fused(tile, n, after)
    if reason is not None:
        raise ValueError(reason)
    if isinstance(after, RopeCacheAfter):
        _, kv_heads, _, head_dim = after.place.k_cache.shape
        heads, slots = after.num_heads + 2 * kv_heads, len(after.place.slots)
        if n != heads * head_dim or m != slots:
            raise ValueError(f"a product of [{m}, {n}] is not {heads} heads of {head_dim} for {slots} slots")


_NO_HEADS: dict[str, Any] = dict.fromkeys(
    ("cos_ptr", "sin_ptr", "slots_ptr", "k_cache_ptr", "v_cache_ptr", "kv_scales_ptr", "cache_stride", "HEADS")
)


def _head_arguments(after: RopeCacheAfter) -> dict[str, Any]:
    """Returns what the kernels want to know of heads, in place of `_NO_HEADS`."""
    place, rotation = after.place, after.rotation
    _, kv_heads, tokens_per_block, head_dim = place.k_cache.shape
    float8 = place.k_cache.dtype is torch.float8_e4m3fn
    rotary, interleaved = (0, False) if rotation is None else (rotation.rotary_dim, rotation.interleaved)
    return {
        "cos_ptr": None if rotation is None else rotation.cos,
        "sin_ptr": None if rotation is None else rotation.sin,
        "slots_ptr": place.slots,
        "k_cache_ptr": float8_storage(place.k_cache) if float8 else place.k_cache,
        "v_cache_ptr": float8_storage(place.v_cache) if float8 else place.v_cache,
        "kv_scales_ptr": place.scales if float8 else None,
        "cache_stride": place.k_cache.stride(0),
        "HEADS": Heads(after.num_heads, kv_heads, head_dim, rotary, interleaved, tokens_per_block, float8),
    }


def _launch_vectors(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    bias: Tensor | None,
    scales: Scales | None,
    gate: SiluGateAfter | None,
    tile: VectorTile,
    common: dict[str, Any],
) -> None:
    m, n = x.shape[0], w.shape[0]
    quantize = gate is not None and gate.out_scale is not None
    vector_kernel[(-(-n // tile.block_n),)](
        x,
        w,
        float8_storage(out) if quantize else out,
        bias,
        None if scales is None else scales.x,
        None if scales is None else scales.w,
        None if gate is None else gate.out_scale,
        m,
        n,
        x.stride(0),
        ROWS=next_power_of_2(m),
        LANES=32 * tile.num_warps,
        VEC=16 // w.element_size(),
        GATED=gate is not None,
        QUANTIZE=quantize,
        **common,
    )


def _launch_matrices(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    bias: Tensor | None,
    scales: Scales | None,
    tile: MatrixTile,
    common: dict[str, Any],
) -> None:
    n = w.shape[0]
    matrix_kernel[(-(-n // tile.block_n),)](
        x,
        w,
        out,
        bias,
        None if scales is None else scales.x,
        None if scales is None else scales.w,
        x.shape[0],
        n,
        x.stride(0),
        ROWS=MOST_ROWS,
        SPLITS=tile.num_warps,
        BLOCK_K=tile.block_k,
        STAGES=tile.num_stages,
        INTERPRETED=is_interpreted(),
        **common,
    )


def _empty_output(m: int, n: int, dtype: torch.dtype, after: FusedStep | None, device: torch.device) -> Tensor:
    """Returns room for the result of a product [m, n] in ``dtype``, or for what ``after`` makes of it."""
    if isinstance(after, SiluGateAfter):
        n //= 2
        dtype = dtype if after.out_scale is None else torch.float8_e4m3fn
    elif isinstance(after, RopeCacheAfter):
        n = after.num_heads * after.place.k_cache.shape[3]
    return torch.empty((m, n), dtype=dtype, device=device)


@functools.lru_cache(maxsize=1024)
def default_tile(m: int, n: int, k: int, itemsize: int) -> VectorTile | MatrixTile:
    """Returns the tile for a product of m rows by a weight [n, k] of ``itemsize`` bytes per number.

    The fastest in sum over the products of Llama-3.1-8B on an H100 (``benchmarks/gpu_matmul.py``). Float8 numbers cost
    more to convert than to read, which from three rows on only the matrix units keep up with.
    """
    deep = k > 8192
    if itemsize == 1:
        if m == 1:
            return _float8_row_tile(n, deep=deep)
        if m == 2 and not deep:
            return VectorTile(block_n=4, num_warps=4)
    elif m <= 2:
        return VectorTile(block_n=8 if deep else 4, num_warps=8)
    elif m <= MOST_VECTOR_ROWS:
        return VectorTile(block_n=4, num_warps=2) if n > 16384 else VectorTile(block_n=2, num_warps=4)
    return MatrixTile(block_n=16, block_k=256 // itemsize, num_warps=2, num_stages=4)


def _float8_row_tile(n: int, *, deep: bool) -> VectorTile:
    """Returns the tile for one row by a float8 weight, as measured in whole layers with attention.

    A layer of Llama-3.1-8B takes 86.25 us on an H100 with (2, 4) for o, 0.6 less with (4, 4); 87.9 with (2, 8)
    everywhere but down (4, 4), and nothing ahead.
    """
    if deep:
        return VectorTile(block_n=4, num_warps=4, ahead=2048)
    if n > 16384:
        return VectorTile(block_n=2, num_warps=8, ahead=2048)
    return VectorTile(block_n=4 if n <= 4096 else 2, num_warps=4)


@functools.lru_cache(maxsize=1024)
def _lines_ahead(tile: VectorTile | MatrixTile, k: int, itemsize: int) -> int:
    """Returns ``tile.ahead`` in lines of 128 bytes, at most what a row has, as a power of two."""
    lines = -(-min(tile.ahead, k * itemsize) // 128)
    return next_power_of_2(lines) if lines else 0
