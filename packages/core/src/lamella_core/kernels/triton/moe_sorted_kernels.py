"""Kernels of `lamella_core.kernels.triton.moe_sorted`: products over rows that lie sorted by expert.

Shape legend: A assignments of tokens to experts, R sorted rows (of whole blocks, so R >= A), E experts of this rank, N
outputs and K inputs of a projection.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.moe_kernels import place, swiglu
from lamella_core.kernels.triton.quantize import from_float8, to_scaled_float8


@triton.jit
def spread_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [A / SHARE, WIDTH], rows stride_x apart; that of assignment a is a // SHARE
    x_scale_ptr,  # float32 [A / SHARE], moved with the rows; or None
    scale_ptr,  # float32 [E]: rows become float8 by their expert's; or None
    experts_ptr,  # [A] int64
    places_ptr,  # [A] int32, see `Blocks`
    out_ptr,  # [R, WIDTH]
    out_scale_ptr,  # float32 [R] or None
    first_expert,
    stride_x,
    SHARE: tl.constexpr,
    HELD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Copies one row to the places of its assignments; padding stays as it is."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0)
    for choice in tl.static_range(SHARE):
        expert = tl.load(experts_ptr + row * SHARE + choice) - first_expert
        held = (expert >= 0) & (expert < HELD)
        to = tl.load(places_ptr + row * SHARE + choice, mask=held, other=0).to(tl.int64)
        value = x
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + expert, mask=held, other=1.0)
            value = to_scaled_float8(x.to(tl.float32), scale, NATIVE_FLOAT8)
        tl.store(out_ptr + to * WIDTH + cols, value, mask=mask & held)
        if x_scale_ptr is not None:
            tl.store(out_scale_ptr + to, tl.load(x_scale_ptr + row), mask=held & (tl.program_id(1) == 0))


@triton.jit
def _halves(acc):  # type: ignore[no-untyped-def]
    """Splits [M, N] into its left and its right columns."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    x_desc,
    w_desc,
    row,
    part,
    col,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,  # float8 as bytes
):
    """Returns the product [BLOCK_M, BLOCK_N] float32 of rows of x and of a weight."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x = x_desc.load([row, k])
        w = w_desc.load([part, col, k]).reshape(BLOCK_N, BLOCK_K)
        if WIDEN:
            x = from_float8(x, False).to(tl.float16)  # exact, and so are the products
            w = from_float8(w, False).to(tl.float16)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _finished(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M, COLS] float32: sums of one half's outputs, or of neighbouring ones
    row,  # first sorted row
    col,  # first output of the expert's weight
    last,  # outputs from here on do not exist
    expert,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    N: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
):
    """Multiplies by scales and adds the bias."""
    cols = col + tl.arange(0, acc.shape[1])
    inside = cols < last
    if w_scale_ptr is not None:
        if SCALE_PER_COL:
            acc *= tl.load(w_scale_ptr + expert * N + cols, mask=inside, other=0.0)[None, :]
        else:
            acc *= tl.load(w_scale_ptr + expert)
        if SCALE_PER_ROW:
            acc *= tl.load(x_scale_ptr + row + tl.arange(0, acc.shape[0]))[:, None]
        else:
            acc *= tl.load(x_scale_ptr + expert)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def sorted_product_kernel(  # type: ignore[no-untyped-def]
    x_desc,  # [R, K] in blocks of [BLOCK_M, BLOCK_K]
    w_desc,  # [E * PARTS, N / PARTS, K] in blocks of [PARTS, BLOCK_N / PARTS, BLOCK_K]
    out_desc,  # [R, N / PARTS] in blocks of [BLOCK_M, BLOCK_N / 2]
    bias_ptr,  # [E, N] or None
    x_scale_ptr,  # float32 [R] or [E], or None
    w_scale_ptr,  # float32 [E] or [E, N]; None: nothing is float8
    out_scale_ptr,  # float32 [E]: the gate's results become float8; or None
    expert_of_ptr,  # see `Blocks` for this and the next
    used_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    FLATTEN: tl.constexpr,  # the loads of a program's next block begin before this block's end
    DTYPE: tl.constexpr,  # of the product, before it is quantized
    SCALE_PER_ROW: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
    GATE: tl.constexpr,  # (alpha, offset, limit) of `swiglu`, or None
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Blocks of rows of one expert times blocks of its outputs; a program computes every so many of them.

    With a gate a block has as many outputs of gate as of up, side by side.
    """
    PARTS: tl.constexpr = 1 if GATE is None else 2
    WIDTH: tl.constexpr = N // PARTS
    COLS: tl.constexpr = BLOCK_N // PARTS  # outputs of each part in a block
    HALF: tl.constexpr = BLOCK_N // 2
    N_BLOCKS: tl.constexpr = (WIDTH + COLS - 1) // COLS
    WIDEN: tl.constexpr = w_scale_ptr is not None and not NATIVE_FLOAT8
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    used = tl.load(used_ptr)
    for program in tl.range(tl.program_id(0), used * N_BLOCKS, tl.num_programs(0), flatten=FLATTEN):
        block, n_block = place(program, used, N_BLOCKS, GROUP)
        expert = tl.load(expert_of_ptr + block)
        row, col = block * BLOCK_M, n_block * COLS
        acc = _sums(x_desc, w_desc, row, expert * PARTS, col, K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, WIDEN)
        left, right = _halves(acc)
        right_col = WIDTH + col if PARTS == 2 else col + HALF  # in the weight
        left = _finished(
            left, row, col, WIDTH, expert, x_scale_ptr, w_scale_ptr, bias_ptr, N, SCALE_PER_ROW, SCALE_PER_COL
        ).to(DTYPE)
        right = _finished(
            right, row, right_col, N, expert, x_scale_ptr, w_scale_ptr, bias_ptr, N, SCALE_PER_ROW, SCALE_PER_COL
        ).to(DTYPE)
        if GATE is None:
            out_desc.store([row, col], left)
            out_desc.store([row, col + HALF], right)
        else:
            result = swiglu(left, right, GATE[0], GATE[1], GATE[2])
            if out_scale_ptr is not None:
                result = to_scaled_float8(result.to(tl.float32), tl.load(out_scale_ptr + expert), NATIVE_FLOAT8)
            out_desc.store([row, col], result)
