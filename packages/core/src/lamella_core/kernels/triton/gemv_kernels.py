"""Kernels of few rows' products, launched by `lamella_core.kernels.triton.gemv`, which says how they work.

Shape legend: as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamella_core.kernels.triton.activation import gated_silu
from lamella_core.kernels.triton.launch import fetch_lines
from lamella_core.kernels.triton.quantize import to_float8

_LINE_BYTES = tl.constexpr(128)


@triton.jit
def _prefetch(  # type: ignore[no-untyped-def]
    base, row, inside, SKIPPED: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr
):
    """Asks for LINES 128-byte lines of each weight row in the L2 cache, from SKIPPED bytes on."""
    BYTES: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    line = tl.arange(0, LINES)[None, :] * _LINE_BYTES
    rows_at = (base + tl.where(inside, row, 0) * K)[:, None]
    fetch_lines(rows_at.to(tl.int64) + tl.minimum(line + SKIPPED, (K - 1) * BYTES))


@triton.jit
def weight_rows(block, n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
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
def vector_kernel(  # type: ignore[no-untyped-def]
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
    """Up to 4 rows; each thread has its part of K."""
    BLOCK_K: tl.constexpr = LANES * VEC
    EVEN: tl.constexpr = K % BLOCK_K == 0
    first, w_row, w_row_inside = weight_rows(tl.program_id(0), n, BLOCK_N, GATED)
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
def matrix_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # as in vector_kernel
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
    """Up to 16 rows, by matrix units; each warp has its part of K."""
    TURN: tl.constexpr = SPLITS * BLOCK_K
    EVEN: tl.constexpr = K % TURN == 0
    first, w_row, w_row_inside = weight_rows(tl.program_id(0), n, BLOCK_N, False)
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
