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

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton.launch import is_interpreted, launch_options, next_power_of_2, use_pdl

MOST_ROWS = 16
MOST_VECTOR_ROWS = 4
_LINE_BYTES = tl.constexpr(128)


@dataclass(frozen=True, slots=True)
class VectorTile:
    """How `_vector_kernel` divides the work.

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
    """How `_matrix_kernel` divides the work.

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


@triton.jit
def _prefetch(pointers):  # type: ignore[no-untyped-def]
    """Asks for the 128-byte lines at these addresses in the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    acc,  # [ROWS, BLOCK_N] float32
    rows,  # [ROWS]
    cols,  # [BLOCK_N]
    out_ptr,
    bias_ptr,
    x_scale_ptr,
    w_scale_ptr,
    m,
    n,
    SCALED: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
):
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    if SCALED:
        if SCALE_PER_COL:
            acc *= tl.load(w_scale_ptr + cols, mask=cols < n, other=0.0)[None, :]
        else:
            acc *= tl.load(w_scale_ptr)
        if SCALE_PER_ROW:
            acc *= tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0)[:, None]
        else:
            acc *= tl.load(x_scale_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m"])
def _vector_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K], rows stride_x apart
    w_ptr,  # [N, K]
    out_ptr,  # [M, N]
    bias_ptr,  # [N] or None
    x_scale_ptr,  # [] or [M] float32, or None
    w_scale_ptr,  # [] or [N] float32, or None
    m,
    n,
    stride_x,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # least power of two that holds M
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,  # threads of the program
    VEC: tl.constexpr,  # weight elements in 16 bytes
    AHEAD: tl.constexpr,  # 128-byte lines of each weight row to prefetch, a power of two, or 0
    SCALED: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    BLOCK_K: tl.constexpr = LANES * VEC
    EVEN: tl.constexpr = K % BLOCK_K == 0
    first = tl.program_id(0) * BLOCK_N
    base = w_ptr + first.to(tl.int64) * K
    # Lanes come first, so that each gets a thread, and a thread holds its part of all outputs and rows.
    k = tl.arange(0, LANES)[:, None, None, None] * VEC + tl.arange(0, VEC)[None, None, None, :]
    col = tl.arange(0, BLOCK_N)[None, :, None, None]
    row = tl.arange(0, ROWS)[None, None, :, None]
    w_at = base + col * K + k  # [LANES, BLOCK_N, 1, VEC]
    w_inside = first + col < n
    x_at = x_ptr + row * stride_x + k  # [LANES, 1, ROWS, VEC]
    x_inside = row < m

    w = tl.load(w_at, mask=w_inside & (EVEN | (k < K)), other=0.0, eviction_policy="evict_first")
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            line = tl.arange(0, AHEAD)[None, :] * _LINE_BYTES
            rows_at = (base + tl.minimum(tl.arange(0, BLOCK_N), n - 1 - first) * K)[:, None]
            skipped: tl.constexpr = BLOCK_K * 16 // VEC
            _prefetch(rows_at.to(tl.int64) + tl.minimum(line + skipped, (K - 1) * 16 // VEC))
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_at, mask=x_inside & (EVEN | (k < K)), other=0.0)
    acc = tl.zeros([LANES, BLOCK_N, ROWS], tl.float32)
    for begin in range(BLOCK_K, K, BLOCK_K):
        inside = EVEN | (begin + k < K)
        next_w = tl.load(w_at + begin, mask=w_inside & inside, other=0.0, eviction_policy="evict_first")
        next_x = tl.load(x_at + begin, mask=x_inside & inside, other=0.0)
        acc += tl.sum(w.to(tl.float32) * x.to(tl.float32), axis=3)
        w = next_w
        x = next_x
    acc += tl.sum(w.to(tl.float32) * x.to(tl.float32), axis=3)
    total = tl.trans(tl.sum(acc, axis=0))
    rows = tl.arange(0, ROWS)
    cols = first + tl.arange(0, BLOCK_N)
    _store(total, rows, cols, out_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, m, n, SCALED, SCALE_PER_ROW, SCALE_PER_COL)


@triton.jit(do_not_specialize=["m"])
def _matrix_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # as in _vector_kernel
    w_ptr,
    out_ptr,
    bias_ptr,
    x_scale_ptr,
    w_scale_ptr,
    m,
    n,
    stride_x,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # 16, what a matrix unit takes
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,  # parts of K that are summed at the end, one per warp
    BLOCK_K: tl.constexpr,  # inputs of one part per turn
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,  # 128-byte lines of each weight row to prefetch, a power of two, or 0
    SCALED: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
    USE_PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,  # the interpreter multiplies no bfloat16
):
    TURN: tl.constexpr = SPLITS * BLOCK_K
    EVEN: tl.constexpr = K % TURN == 0
    BYTES: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    first = tl.program_id(0) * BLOCK_N
    base = w_ptr + first.to(tl.int64) * K
    k = tl.arange(0, SPLITS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    col = tl.arange(0, BLOCK_N)[None, :, None]
    row = tl.arange(0, ROWS)[None, :, None]
    w_at = base + col * K + k  # [SPLITS, BLOCK_N, BLOCK_K]
    x_at = x_ptr + row * stride_x + k  # [SPLITS, ROWS, BLOCK_K]
    w_inside = first + col < n
    x_inside = row < m
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            line = tl.arange(0, AHEAD)[None, :] * _LINE_BYTES
            rows_at = (base + tl.minimum(tl.arange(0, BLOCK_N), n - 1 - first) * K)[:, None]
            _prefetch(rows_at.to(tl.int64) + tl.minimum(line, (K - 1) * BYTES))
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([SPLITS, BLOCK_N, ROWS], tl.float32)
    for begin in tl.range(0, K, TURN, num_stages=STAGES):
        inside = EVEN | (begin + k < K)
        w = tl.load(w_at + begin, mask=w_inside & inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + begin, mask=x_inside & inside, other=0.0)
        if SCALED:
            w = w.to(tl.float16)  # exact, and so are the products
            x = x.to(tl.float16)
        if INTERPRETED:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc)
    total = tl.trans(tl.sum(acc, axis=0))
    rows = tl.arange(0, ROWS)
    cols = first + tl.arange(0, BLOCK_N)
    _store(total, rows, cols, out_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, m, n, SCALED, SCALE_PER_ROW, SCALE_PER_COL)


def few_rows_matmul(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    scales: Scales | None = None,
    *,
    tile: VectorTile | MatrixTile | None = None,
) -> Tensor:
    """Returns x [M, K] times w [N, K] transposed plus bias [N]: [M, N] in x's dtype, or in that of ``scales``.

    Args:
        x: bf16, fp16 or float8_e4m3fn; its rows are contiguous. M is at most `MOST_ROWS`.
        w: of x's dtype, contiguous.
        bias: of the result's dtype.
        scales: of a float8 product.
        tile: how to divide the work; None: `default_tile`. A `VectorTile` takes up to `MOST_VECTOR_ROWS`.

    Raises:
        ValueError: more rows than that.
    """
    m, k = x.shape
    n = w.shape[0]
    if m > (MOST_VECTOR_ROWS if isinstance(tile, VectorTile) else MOST_ROWS):
        raise ValueError(
            f"{m} rows are more than this kernel takes ({MOST_VECTOR_ROWS} by vectors, {MOST_ROWS} at all)"
        )
    out = torch.empty((m, n), dtype=x.dtype if scales is None else scales.out_dtype, device=x.device)
    if m == 0:
        return out
    tile = tile or default_tile(m, n, k, w.element_size())
    common = {
        "K": k,
        "BLOCK_N": tile.block_n,
        "SCALED": scales is not None,
        "SCALE_PER_ROW": scales is not None and scales.x.numel() > 1,
        "SCALE_PER_COL": scales is not None and scales.w.numel() > 1,
        "USE_PDL": use_pdl(),
        "AHEAD": _lines_ahead(tile, k, w.element_size()),
        "num_warps": tile.num_warps,
        **launch_options(),
    }
    x_scale, w_scale = (None, None) if scales is None else (scales.x, scales.w)
    arguments = (x, w, out, bias, x_scale, w_scale, m, n, x.stride(0))
    grid = (-(-n // tile.block_n),)
    if isinstance(tile, VectorTile):
        rows = 1 if m == 1 else 2 if m == 2 else 4
        vec = 16 // w.element_size()
        _vector_kernel[grid](*arguments, ROWS=rows, LANES=32 * tile.num_warps, VEC=vec, **common)
    else:
        split = {
            "SPLITS": tile.num_warps,
            "BLOCK_K": tile.block_k,
            "STAGES": tile.num_stages,
            "INTERPRETED": is_interpreted(),
        }
        _matrix_kernel[grid](*arguments, ROWS=MOST_ROWS, **split, **common)
    return out


@functools.lru_cache(maxsize=1024)
def default_tile(m: int, n: int, k: int, itemsize: int) -> VectorTile | MatrixTile:
    """Returns the tile for a product of m rows by a weight [n, k] of ``itemsize`` bytes per number.

    Narrow weights get few outputs per program, so that every multiprocessor has several programs to hide latency with.
    """
    if m > MOST_VECTOR_ROWS:
        return MatrixTile(block_n=16 if n <= 8192 else 32, block_k=128 // itemsize, num_warps=4, num_stages=4)
    return VectorTile(block_n=8 if m == 1 and n > 8192 else 4 if m <= 2 or itemsize == 2 else 2, num_warps=4)


@functools.lru_cache(maxsize=1024)
def _lines_ahead(tile: VectorTile | MatrixTile, k: int, itemsize: int) -> int:
    """Returns ``tile.ahead`` in lines of 128 bytes, at most what a row has, as a power of two."""
    lines = -(-min(tile.ahead, k * itemsize) // 128)
    return next_power_of_2(lines) if lines else 0
