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
import triton
import triton.language as tl
from torch import Tensor

from lamella_core.kernels.fused import SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton.activation import gated_silu
from lamella_core.kernels.triton.launch import (
    float8_storage,
    has_float8,
    is_interpreted,
    launch_options,
    next_power_of_2,
    use_pdl,
)
from lamella_core.kernels.triton.quantize import to_float8

MOST_ROWS = 16
MOST_VECTOR_ROWS = 4
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
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
def _prefetch(  # type: ignore[no-untyped-def]
    base, row, inside, SKIPPED: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr
):
    """Asks for LINES 128-byte lines of each weight row in the L2 cache, from SKIPPED bytes on."""
    BYTES: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    line = tl.arange(0, LINES)[None, :] * _LINE_BYTES
    rows_at = (base + tl.where(inside, row, 0) * K)[:, None]
    pointers = rows_at.to(tl.int64) + tl.minimum(line + SKIPPED, (K - 1) * BYTES)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _weight_rows(block, n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the first weight row of a block, the block's rows relative to it, and which of them exist.

    GATED: n rows are [gate, up], and a block alternates rows of both halves.
    """
    row = tl.arange(0, BLOCK_N)
    if GATED:
        half = n // 2
        first = block * (BLOCK_N // 2)
        inside = first + row // 2 < half
        row = (row // 2).to(tl.int64) + (row % 2).to(tl.int64) * half
    else:
        first = block * BLOCK_N
        inside = first + row < n
    return first, row, inside


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    acc,  # [ROWS, BLOCK_N] float32, of the weight rows first + row
    first,
    row,
    inside,
    out_ptr,
    bias_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_scale_ptr,
    m,
    n,
    DTYPE: tl.constexpr,  # of the product, before it is quantized
    SCALED: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
    GATED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    """Scales sums, adds the bias, and stores them, or what the gate makes of them, in `out_ptr`."""
    ROWS: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    rows = tl.arange(0, ROWS)
    if SCALED:
        if SCALE_PER_COL:
            acc *= tl.load(w_scale_ptr + first + row, mask=inside, other=0.0)[None, :]
        else:
            acc *= tl.load(w_scale_ptr)
        if SCALE_PER_ROW:
            acc *= tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0)[:, None]
        else:
            acc *= tl.load(x_scale_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(acc.to(DTYPE), (ROWS, BLOCK_N // 2, 2)))
        result = gated_silu(gate, up)
        if QUANTIZE:
            result = to_float8(tl.div_rn(result.to(tl.float32), tl.load(out_scale_ptr).to(tl.float32)), NATIVE_FLOAT8)
        width = n // 2
        cols = first + tl.arange(0, BLOCK_N // 2)
    else:
        result = acc.to(DTYPE)
        width = n
        cols = first + tl.arange(0, BLOCK_N)
    at = out_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(at, result, mask=(rows < m)[:, None] & (cols < width)[None, :])


@triton.jit(do_not_specialize=["m"])
def _vector_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K], rows stride_x apart
    w_ptr,  # [N, K]
    out_ptr,  # [M, N], or [M, N / 2] if GATED
    bias_ptr,  # [N] or None
    x_scale_ptr,  # [] or [M] float32, or None
    w_scale_ptr,  # [] or [N] float32, or None
    out_scale_ptr,  # [] float32, or None
    m,
    n,
    stride_x,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # least power of two that holds M
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,  # threads of the program
    VEC: tl.constexpr,  # weight elements in 16 bytes
    AHEAD: tl.constexpr,  # 128-byte lines of each weight row to prefetch, a power of two, or 0
    DTYPE: tl.constexpr,  # from here on as in `_finish`
    SCALED: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
    GATED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    BLOCK_K: tl.constexpr = LANES * VEC
    EVEN: tl.constexpr = K % BLOCK_K == 0
    first, w_row, w_row_inside = _weight_rows(tl.program_id(0), n, BLOCK_N, GATED)
    base = w_ptr + first.to(tl.int64) * K
    # Lanes come first, so that each gets a thread, and a thread holds its part of all outputs and rows.
    k = tl.arange(0, LANES)[:, None, None, None] * VEC + tl.arange(0, VEC)[None, None, None, :]
    row = tl.arange(0, ROWS)[None, None, :, None]
    w_at = base + w_row[None, :, None, None] * K + k  # [LANES, BLOCK_N, 1, VEC]
    w_inside = w_row_inside[None, :, None, None]
    x_at = x_ptr + row * stride_x + k  # [LANES, 1, ROWS, VEC]
    x_inside = row < m

    w = tl.load(w_at, mask=w_inside & (EVEN | (k < K)), other=0.0, eviction_policy="evict_first")
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(base, w_row, w_row_inside, LANES * 16, K, AHEAD)
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
    _finish(
        total, first, w_row, w_row_inside, out_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, out_scale_ptr, m, n,
        DTYPE, SCALED, SCALE_PER_ROW, SCALE_PER_COL, GATED, QUANTIZE, NATIVE_FLOAT8,
    )  # fmt: skip


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
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
    USE_PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,  # the interpreter multiplies no bfloat16
):
    TURN: tl.constexpr = SPLITS * BLOCK_K
    EVEN: tl.constexpr = K % TURN == 0
    first, w_row, w_row_inside = _weight_rows(tl.program_id(0), n, BLOCK_N, False)
    base = w_ptr + first.to(tl.int64) * K
    k = tl.arange(0, SPLITS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    row = tl.arange(0, ROWS)[None, :, None]
    w_at = base + w_row[None, :, None] * K + k  # [SPLITS, BLOCK_N, BLOCK_K]
    x_at = x_ptr + row * stride_x + k  # [SPLITS, ROWS, BLOCK_K]
    w_inside = w_row_inside[None, :, None]
    x_inside = row < m
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(base, w_row, w_row_inside, 0, K, AHEAD)
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
    _finish(
        total, first, w_row, w_row_inside, out_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, None, m, n,
        DTYPE, SCALED, SCALE_PER_ROW, SCALE_PER_COL, GATED=False, QUANTIZE=False, NATIVE_FLOAT8=False,
    )  # fmt: skip


def few_rows_matmul(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    scales: Scales | None = None,
    *,
    gate: SiluGateAfter | None = None,
    tile: VectorTile | MatrixTile | None = None,
) -> Tensor:
    """Returns x [M, K] times w [N, K] transposed plus bias [N]: [M, N] in x's dtype, or in that of ``scales``.

    Args:
        x: bf16, fp16 or float8_e4m3fn; its rows are contiguous. M is at most `MOST_ROWS`.
        w: of x's dtype, contiguous.
        bias: of the result's dtype.
        scales: of a float8 product.
        gate: the result is silu(gate) * up of the product's halves: [M, N / 2]. Needs a `VectorTile`, N even.
        tile: how to divide the work; None: `default_tile`. A `VectorTile` takes up to `MOST_VECTOR_ROWS`.

    Raises:
        ValueError: more rows than that, or a gate with another tile.
    """
    m, k = x.shape
    n = w.shape[0]
    tile = tile or default_tile(m, n, k, w.element_size())
    _check(m, n, tile, gate)
    dtype = x.dtype if scales is None else scales.out_dtype
    out = _empty_output(m, n, dtype, gate, x.device)
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
        "USE_PDL": use_pdl(),
        "num_warps": tile.num_warps,
        **launch_options(),
    }
    if isinstance(tile, VectorTile):
        _launch_vectors(x, w, out, bias, scales, gate, tile, common)
    else:
        _launch_matrices(x, w, out, bias, scales, tile, common)
    return out


def _check(m: int, n: int, tile: VectorTile | MatrixTile, gate: SiluGateAfter | None) -> None:
    vectors = isinstance(tile, VectorTile)
    if m > (MOST_VECTOR_ROWS if vectors or gate is not None else MOST_ROWS):
        raise ValueError(
            f"{m} rows are more than this kernel takes ({MOST_VECTOR_ROWS} by vectors, {MOST_ROWS} at all)"
        )
    if gate is not None and (not vectors or tile.block_n < 2 or n % 2):
        raise ValueError(f"a gate needs a VectorTile of 2 outputs or more and an even N; they are {tile} and {n}")


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
    _vector_kernel[(-(-n // tile.block_n),)](
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
        NATIVE_FLOAT8=has_float8(),
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
    _matrix_kernel[(-(-n // tile.block_n),)](
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


def _empty_output(m: int, n: int, dtype: torch.dtype, gate: SiluGateAfter | None, device: torch.device) -> Tensor:
    """Returns room for the result of a product [m, n] in ``dtype``, or for what ``gate`` makes of it."""
    if gate is None:
        return torch.empty((m, n), dtype=dtype, device=device)
    gated_dtype = dtype if gate.out_scale is None else torch.float8_e4m3fn
    return torch.empty((m, n // 2), dtype=gated_dtype, device=device)


@functools.lru_cache(maxsize=1024)
def default_tile(m: int, n: int, k: int, itemsize: int) -> VectorTile | MatrixTile:
    """Returns the tile for a product of m rows by a weight [n, k] of ``itemsize`` bytes per number.

    The fastest in sum over the products of Llama-3.1-8B on an H100 (``benchmarks/gpu_matmul.py``). Float8 numbers cost
    more to convert than to read, which from three rows on only the matrix units keep up with.
    """
    deep = k > 8192
    if itemsize == 1:
        if m == 1:
            return VectorTile(block_n=4, num_warps=4) if deep else VectorTile(block_n=2, num_warps=8)
        if m == 2 and not deep:
            return VectorTile(block_n=4, num_warps=4)
    elif m <= 2:
        return VectorTile(block_n=8 if deep else 4, num_warps=8)
    elif m <= MOST_VECTOR_ROWS:
        return VectorTile(block_n=4, num_warps=2) if n > 16384 else VectorTile(block_n=2, num_warps=4)
    return MatrixTile(block_n=16, block_k=256 // itemsize, num_warps=2, num_stages=4)


@functools.lru_cache(maxsize=1024)
def _lines_ahead(tile: VectorTile | MatrixTile, k: int, itemsize: int) -> int:
    """Returns ``tile.ahead`` in lines of 128 bytes, at most what a row has, as a power of two."""
    lines = -(-min(tile.ahead, k * itemsize) // 128)
    return next_power_of_2(lines) if lines else 0
