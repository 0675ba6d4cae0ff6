"""Kernels of few rows' products, launched by `lamella_core.kernels.triton.gemv`, which says how they work.

Shape legend: as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamella_core.kernels.triton.gemv_epilogue import finish, load_constants, load_inputs, weight_rows
from lamella_core.kernels.triton.launch import fetch_lines

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


@triton.jit(do_not_specialize=["m"])
def vector_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K], rows stride_x apart
    w_ptr,  # [N, K]
    out_ptr,  # [M, N], or [M, N / 2] if GATED, or queries [M, Hq * D] if HEADS
    bias_ptr, x_scale_ptr, w_scale_ptr, out_scale_ptr,  # [N]; float32 [] or [M], [] or [N], []; each may be None
    m, n, stride_x,
    cos_ptr, sin_ptr,  # [M, rotary / 2] float32; this and the rest with HEADS, or None
    slots_ptr,  # [M] int64
    k_cache_ptr, v_cache_ptr, kv_scales_ptr, cache_stride,  # blocks are cache_stride apart; scales [2] float32 or None
    K: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # least power of two that holds M
    LANES: tl.constexpr,  # threads of the program
    VEC: tl.constexpr,  # weight elements in 16 bytes
    AHEAD: tl.constexpr,  # 128-byte lines of each weight row to prefetch, a power of two, or 0
    DTYPE: tl.constexpr,  # of the product, before `finish` makes something of it
    SCALED: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SCALE_PER_COL: tl.constexpr,
    HEADS: tl.constexpr,  # the outputs are these `Heads`, or None
    GATED: tl.constexpr, QUANTIZE: tl.constexpr,  # what the gate makes is divided by out_scale and float8
    NATIVE_FLOAT8: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Up to 4 rows; each thread has its part of K."""
    BLOCK_K: tl.constexpr = LANES * VEC
    EVEN: tl.constexpr = K % BLOCK_K == 0
    block = tl.program_id(0)
    first, w_row, w_row_inside = weight_rows(block, n, BLOCK_N, GATED, HEADS)
    base = w_ptr + first.to(tl.int64) * K
    # Lanes come first, so that each gets a thread, and a thread holds its part of all outputs and rows.
    k = tl.arange(0, LANES)[:, None, None, None] * VEC + tl.arange(0, VEC)[None, None, None, :]
    row = tl.arange(0, ROWS)[None, None, :, None]
    w_at = base + w_row[None, :, None, None] * K + k  # [LANES, BLOCK_N, 1, VEC]
    w_inside = w_row_inside[None, :, None, None]
    x_at = x_ptr + row * stride_x + k  # [LANES, 1, ROWS, VEC]
    x_inside = row < m
    w = tl.load(w_at, mask=w_inside & (EVEN | (k < K)), other=0.0, eviction_policy="evict_first")
    constants = load_constants(
        first, w_row, w_row_inside, bias_ptr, w_scale_ptr, out_scale_ptr, kv_scales_ptr, SCALED, SCALE_PER_COL, HEADS
    )  # fmt: skip
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(base, w_row, w_row_inside, LANES * 16, K, AHEAD)
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_at, mask=x_inside & (EVEN | (k < K)), other=0.0)
    inputs = load_inputs(
        block, x_scale_ptr, cos_ptr, sin_ptr, slots_ptr, m, ROWS, BLOCK_N, SCALED, SCALE_PER_ROW, HEADS
    )  # fmt: skip
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
    finish(
        total, block, first, constants, inputs, out_ptr, k_cache_ptr, v_cache_ptr, cache_stride, m, n,
        bias_ptr is not None, SCALED, DTYPE, HEADS, GATED, QUANTIZE, NATIVE_FLOAT8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def matrix_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # as in vector_kernel
    w_ptr,
    out_ptr,
    bias_ptr, x_scale_ptr, w_scale_ptr,
    m, n, stride_x,
    cos_ptr, sin_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, kv_scales_ptr, cache_stride,
    K: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # 16, what a matrix unit takes
    SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,  # parts of K that are summed at the end, one per warp; inputs a turn
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,  # 128-byte lines of each weight row to prefetch, a power of two, or 0
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SCALE_PER_COL: tl.constexpr,
    HEADS: tl.constexpr, NATIVE_FLOAT8: tl.constexpr, USE_PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,  # the interpreter multiplies no bfloat16
):  # fmt: skip
    """Up to 16 rows, by matrix units; each warp has its part of K."""
    TURN: tl.constexpr = SPLITS * BLOCK_K
    EVEN: tl.constexpr = K % TURN == 0
    block = tl.program_id(0)
    first, w_row, w_row_inside = weight_rows(block, n, BLOCK_N, False, HEADS)
    base = w_ptr + first.to(tl.int64) * K
    k = tl.arange(0, SPLITS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    row = tl.arange(0, ROWS)[None, :, None]
    w_at = base + w_row[None, :, None] * K + k  # [SPLITS, BLOCK_N, BLOCK_K]
    x_at = x_ptr + row * stride_x + k  # [SPLITS, ROWS, BLOCK_K]
    w_inside = w_row_inside[None, :, None]
    x_inside = row < m
    constants = load_constants(
        first, w_row, w_row_inside, bias_ptr, w_scale_ptr, None, kv_scales_ptr, SCALED, SCALE_PER_COL, HEADS
    )  # fmt: skip
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(base, w_row, w_row_inside, 0, K, AHEAD)
        tl.extra.cuda.gdc_wait()
    inputs = load_inputs(
        block, x_scale_ptr, cos_ptr, sin_ptr, slots_ptr, m, ROWS, BLOCK_N, SCALED, SCALE_PER_ROW, HEADS
    )  # fmt: skip
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
    finish(
        total, block, first, constants, inputs, out_ptr, k_cache_ptr, v_cache_ptr, cache_stride, m, n,
        bias_ptr is not None, SCALED, DTYPE, HEADS, False, False, NATIVE_FLOAT8,
    )  # fmt: skip
