"""Kernels of mixtures of experts, launched by `lamella_core.kernels.triton.moe`, which says how they work.

Shape legend: A assignments of tokens to experts, E experts of this rank, N outputs and K inputs of a projection.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.gemv_epilogue import weight_rows
from lamella_core.kernels.triton.quantize import from_float8, to_scaled_float8


@triton.jit
def swiglu(  # type: ignore[no-untyped-def]
    gate, up, ALPHA: tl.constexpr, OFFSET: tl.constexpr, LIMIT: tl.constexpr
):
    """See `lamella_core.kernels.experts.Swiglu`; float32 inside, rounded once to gate's dtype. NaN stays NaN."""
    wide, factor = gate.to(tl.float32), up.to(tl.float32)
    if LIMIT is not None:
        wide = tl.minimum(wide, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        factor = tl.clamp(factor, -LIMIT, LIMIT, tl.PropagateNan.ALL)
    return (wide / (1.0 + tl.exp(-ALPHA * wide)) * (factor + OFFSET)).to(gate.dtype)


@triton.jit
def place(program, num_blocks, N_BLOCKS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the block of rows and the block of outputs of a program.

    GROUP blocks of rows meet the same outputs one after the other: what they read of a weight stays in the L2 cache.
    """
    first = program // (GROUP * N_BLOCKS) * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    within = program % (GROUP * N_BLOCKS)
    return first + within % size, within // size


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    x_at,  # [BLOCK_M]: where rows begin
    w_at,  # [BLOCK_N]
    x_inside,
    w_inside,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    STREAM: tl.constexpr,  # no other program is expected to read the same weights later
    WIDEN: tl.constexpr,  # float8 as bytes
):
    """Returns the product [BLOCK_M, BLOCK_N] float32 of rows of x and of a weight."""
    BLOCK_M: tl.constexpr = x_at.shape[0]
    BLOCK_N: tl.constexpr = w_at.shape[0]
    EVEN: tl.constexpr = K % BLOCK_K == 0
    EVICTION: tl.constexpr = "evict_first" if STREAM else ""
    k = tl.arange(0, BLOCK_K)
    w_at = w_at[:, None] + k[None, :]
    x_at = x_at[:, None] + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = (EVEN | (begin + k < K))[None, :]
        w = tl.load(w_at + begin, mask=w_inside[:, None] & inside, other=0.0, eviction_policy=EVICTION)
        x = tl.load(x_at + begin, mask=x_inside[:, None] & inside, other=0.0)
        if WIDEN:
            w = from_float8(w, False).to(tl.float16)  # exact, and so are the products
            x = from_float8(x, False).to(tl.float16)
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return tl.trans(acc) if SWAP else acc


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M, BLOCK_N] float32
    x_scale_ptr,
    w_scale_ptr,
    expert,
    x_rows,  # [BLOCK_M] int32
    x_inside,
    w_row,  # [BLOCK_N] int64, in the expert's weight
    w_inside,
    N: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
):
    """Multiplies sums of float8 products by both sides' scales."""
    if SCALE_PER_COL:
        acc *= tl.load(w_scale_ptr + expert * N + w_row, mask=w_inside, other=0.0)[None, :]
    else:
        acc *= tl.load(w_scale_ptr + expert)
    if SCALE_PER_ROW:
        acc *= tl.load(x_scale_ptr + x_rows, mask=x_inside, other=0.0)[:, None]
    else:
        acc *= tl.load(x_scale_ptr + expert)
    return acc


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M, BLOCK_N] float32
    out_ptr,
    out_scale_ptr,
    expert,
    rows,  # [BLOCK_M] int32: assignments
    inside,  # [BLOCK_M]
    first,  # column of out
    N: tl.constexpr,
    DTYPE: tl.constexpr,
    GATE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
):
    """Stores results, or what the gate makes of them: of neighbouring columns."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    if GATE is not None:
        gate, up = tl.split(tl.reshape(acc.to(DTYPE), (BLOCK_M, BLOCK_N // 2, 2)))
        result = swiglu(gate, up, GATE[0], GATE[1], GATE[2])
        if out_scale_ptr is not None:
            result = to_scaled_float8(result.to(tl.float32), tl.load(out_scale_ptr + expert), NATIVE_FLOAT8)
        width = N // 2
        cols = first + tl.arange(0, BLOCK_N // 2)
    else:
        result = acc.to(DTYPE)
        width = N
        cols = first + tl.arange(0, BLOCK_N)
    at = out_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(at, result, mask=inside[:, None] & (cols < width)[None, :])


@triton.jit(do_not_specialize=["total", "num_blocks"])
def product_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, K], rows stride_x apart; that of assignment a is a // SHARE
    w_ptr,  # [E, N, K]
    out_ptr,  # [A, N], or [A, N / 2] with a gate
    bias_ptr,  # [E, N] or None
    x_scale_ptr,  # float32 of each row of x, or [E], or None
    w_scale_ptr,  # float32 [E] or [E, N]; None: nothing is float8
    out_scale_ptr,  # float32 [E]: the gate's results become float8; or None
    token_weight_ptr,  # [A] float32: multiplies results, or None
    experts_ptr,  # [A] int64, see `Blocks` for this and the next two
    rows_ptr,
    expert_of_ptr,
    total,  # A
    num_blocks,
    first_expert,
    stride_x,
    SHARE: tl.constexpr,
    HELD: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,  # the weight is the left operand: the matrix units take few rows better as their columns
    DTYPE: tl.constexpr,  # of the product, before it is quantized
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
    GATE: tl.constexpr,  # (alpha, offset, limit) of `swiglu`, or None
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One block of rows of one expert times one block of its outputs."""
    SCALED: tl.constexpr = w_scale_ptr is not None
    SORTED: tl.constexpr = rows_ptr is not None
    block, n_block = place(tl.program_id(0), num_blocks, (N + BLOCK_N - 1) // BLOCK_N, GROUP)
    w_first, w_row, w_inside = weight_rows(n_block, N, BLOCK_N, GATE is not None)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(expert_of_ptr + block) if SORTED else (tl.load(experts_ptr + block) - first_expert).to(tl.int32)
    if (expert < 0) | (expert >= HELD):
        return
    rows = tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + block * BLOCK_M + rows) if SORTED else tl.where(rows == 0, block, total)
    x_inside, x_rows = rows < total, rows // SHARE
    w_row = w_first + w_row.to(tl.int64)
    w_at = w_ptr + expert.to(tl.int64) * N * K + w_row * K
    x_at = x_ptr + x_rows.to(tl.int64) * stride_x
    acc = _sums(x_at, w_at, x_inside, w_inside, K, BLOCK_K, STAGES, SWAP, SWAP and SORTED, SCALED and not NATIVE_FLOAT8)
    if SCALED:
        acc = _scaled(
            acc, x_scale_ptr, w_scale_ptr, expert, x_rows, x_inside, w_row, w_inside, N, SCALE_PER_ROW, SCALE_PER_COL
        )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + w_row, mask=w_inside, other=0.0).to(tl.float32)[None, :]
    if token_weight_ptr is not None:
        acc *= tl.load(token_weight_ptr + rows, mask=x_inside, other=0.0)[:, None]
    _store(acc, out_ptr, out_scale_ptr, expert, rows, x_inside, w_first, N, DTYPE, GATE, NATIVE_FLOAT8)


@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,  # [T * TOP_K, WIDTH], or as places say; rows of other ranks' experts hold anything
    experts_ptr,  # [T * TOP_K] int64
    places_ptr,  # [T * TOP_K] int32: rows of assignments; None: in their order
    weight_ptr,  # [T * TOP_K] float32: multiplies results, or None
    out_ptr,  # [T, WIDTH]
    first_expert,
    HELD: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The weighted sum of a token's results from this rank's experts, in order of its choices, in float32."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        row = token * TOP_K + choice
        expert = tl.load(experts_ptr + row) - first_expert
        held = (expert >= 0) & (expert < HELD)
        weight = 1.0 if weight_ptr is None else tl.load(weight_ptr + row)
        if places_ptr is not None:
            row = tl.load(places_ptr + row, mask=held, other=0).to(tl.int64)
        acc += weight * tl.load(parts_ptr + row * WIDTH + cols, mask=mask & held, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + cols, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, WIDTH], rows stride_x apart; that of assignment a is a // SHARE
    scale_ptr,  # [E] float32
    experts_ptr,  # [A] int64
    out_ptr,  # [A, WIDTH] float8
    first_expert,
    stride_x,
    SHARE: tl.constexpr,
    HELD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The input of each assignment, divided by its expert's scale; nothing for other ranks' experts."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(experts_ptr + row) - first_expert
    held = (expert >= 0) & (expert < HELD)
    mask = (cols < WIDTH) & held
    scale = tl.load(scale_ptr + expert, mask=held, other=1.0)
    x = tl.load(x_ptr + row // SHARE * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + cols, to_scaled_float8(x, scale, NATIVE_FLOAT8), mask=mask)
