"""The product over sorted rows of `moe_sorted` with a role for each group of warps, on Hopper.

One warp asks the copy engine for boxes of both operands, as far ahead as shared memory reaches; two groups of four
warps multiply 64 rows each, and give boxes back. They meet at barriers in shared memory alone, so one group stores its
results while the other multiplies. See "wgmma", "mbarrier" and "setmaxnreg" in the PTX manual.

Shape legend: R sorted rows (of whole blocks), E experts of this rank, N outputs and K inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.moe_kernels import place, swiglu
from lamella_core.kernels.triton.quantize import to_float8

GROUP_ROWS = 64  # of a group of warps: what one instruction multiplies
LOADER_REGISTERS, GROUP_REGISTERS, MOST_REGISTERS = 24, 240, 168  # a thread's; the last: on average


@gluon.jit
def _load(  # type: ignore[no-untyped-def]
    x_desc,
    w_desc,
    x_boxes,
    w_boxes,
    full,
    free,
    expert_of_ptr,
    used,
    N_BLOCKS: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Fills one stage after the other as they become free."""
    STAGES: gl.constexpr = w_boxes.type.shape[0]
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    PARTS: gl.constexpr = w_desc.block_type.shape[0]
    COLS: gl.constexpr = w_desc.block_type.shape[1]
    turn = 0
    for program in range(gl.program_id(0), used * N_BLOCKS, gl.num_programs(0)):
        block, n_block = place(program, used, N_BLOCKS, GROUP)
        part = gl.load(expert_of_ptr + block) * PARTS
        for k in range(0, K, BLOCK_K):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), (turn // STAGES & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, 2 * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [2 * ROWS * block, k], ready, x_boxes.index(2 * stage))
            tma.async_copy_global_to_shared(x_desc, [2 * ROWS * block + ROWS, k], ready, x_boxes.index(2 * stage + 1))
            tma.async_copy_global_to_shared(w_desc, [part, n_block * COLS, k], ready, w_boxes.index(stage))
            turn += 1


@gluon.jit
def _sums(  # type: ignore[no-untyped-def]
    x_boxes,
    w_boxes,
    full,
    free,
    turn,  # how many stages were used before
    WARPS: gl.constexpr,  # 0 or 1: which group of warps
    K: gl.constexpr,
):
    """Returns the product [ROWS, BLOCK_N] float32 of one half of a block's rows, and the next turn."""
    STAGES: gl.constexpr = w_boxes.type.shape[0]
    BLOCK_K: gl.constexpr = w_boxes.type.shape[3]
    BLOCK_N: gl.constexpr = w_boxes.type.shape[1] * w_boxes.type.shape[2]
    ROWS: gl.constexpr = x_boxes.type.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 256 // x_boxes.dtype.primitive_bitwidth]
    )
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    for k in range(0, K, BLOCK_K):
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), turn // STAGES & 1)
        w = w_boxes.index(stage).reshape([BLOCK_N, BLOCK_K]).permute([1, 0])
        acc = warpgroup_mma(x_boxes.index(2 * stage + WARPS), w, acc, is_async=True, use_acc=k > 0)
        acc = warpgroup_mma_wait(1, deps=[acc])  # for the turn before this one
        mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), count=1, pred=k > 0)
        turn += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), count=1)
    return acc, turn


@gluon.jit
def _scaled(  # type: ignore[no-untyped-def]
    acc,  # [ROWS, BLOCK_N] float32
    row,
    col,
    expert,
    bias_ptr,
    x_scale_ptr,
    w_scale_ptr,
    N: gl.constexpr,
    PARTS: gl.constexpr,
    SCALE_PER_ROW: gl.constexpr,
    SCALE_PER_COL: gl.constexpr,
):
    """Multiplies by scales and adds the bias."""
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1] // PARTS
    WIDTH: gl.constexpr = N // PARTS
    at = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    inside = col + at % COLS < WIDTH
    at = expert * N + at // COLS * WIDTH + col + at % COLS
    if w_scale_ptr is not None:
        if SCALE_PER_COL:
            acc *= gl.load(w_scale_ptr + at, mask=inside, other=0.0)[None, :]
        else:
            acc *= gl.load(w_scale_ptr + expert)
        if SCALE_PER_ROW:
            rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc.type.layout))
            acc *= gl.load(x_scale_ptr + row + rows)[:, None]
        else:
            acc *= gl.load(x_scale_ptr + expert)
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + at, mask=inside, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    x_boxes,
    w_boxes,
    out_boxes,
    full,
    free,
    out_desc,
    bias_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_scale_ptr,
    expert_of_ptr,
    used,
    WARPS: gl.constexpr,  # 0 or 1: which group of warps
    N: gl.constexpr,
    N_BLOCKS: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    IS_FLOAT16: gl.constexpr,
    SCALE_PER_ROW: gl.constexpr,
    SCALE_PER_COL: gl.constexpr,
    ALPHA: gl.constexpr,
    OFFSET: gl.constexpr,
    LIMIT: gl.constexpr,
):
    """Multiplies one half of each block's rows."""
    PARTS: gl.constexpr = w_boxes.type.shape[1]
    COLS: gl.constexpr = w_boxes.type.shape[2]
    BLOCK_N: gl.constexpr = PARTS * COLS
    ROWS: gl.constexpr = x_boxes.type.shape[1]
    DTYPE: gl.constexpr = gl.float16 if IS_FLOAT16 else gl.bfloat16  # of the product, before it is quantized
    out = out_boxes.index(WARPS)
    turn = 0
    for program in range(gl.program_id(0), used * N_BLOCKS, gl.num_programs(0)):
        block, n_block = place(program, used, N_BLOCKS, GROUP)
        expert = gl.load(expert_of_ptr + block)
        acc, turn = _sums(x_boxes, w_boxes, full, free, turn, WARPS, K)
        row, col = (2 * block + WARPS) * ROWS, n_block * COLS
        acc = _scaled(acc, row, col, expert, bias_ptr, x_scale_ptr, w_scale_ptr, N, PARTS, SCALE_PER_ROW, SCALE_PER_COL)
        left, right = gl.split(acc.to(DTYPE).reshape([ROWS, 2, BLOCK_N // 2]).permute([0, 2, 1]))
        if PARTS == 2:
            left = swiglu(left, right, ALPHA, OFFSET, LIMIT)
            if out_scale_ptr is not None:
                left = to_float8(gl.div_rn(left.to(gl.float32), gl.load(out_scale_ptr + expert)), True)
        tma.store_wait(0)
        out.store(left)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row, col], out)
        if PARTS == 1:
            tma.store_wait(0)
            out.store(right)
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [row, col + BLOCK_N // 2], out)
    tma.store_wait(0)


@gluon.jit
def specialized_product_kernel(  # type: ignore[no-untyped-def]
    x_desc,  # [R, K] in boxes of [GROUP_ROWS, BLOCK_K]
    w_desc,  # [E * PARTS, N / PARTS, K] in boxes of [PARTS, BLOCK_N / PARTS, BLOCK_K]
    out_desc,  # [R, N / PARTS] in boxes of [GROUP_ROWS, BLOCK_N / 2]
    bias_ptr,  # this and all others: as in `sorted_product_kernel`
    x_scale_ptr,
    w_scale_ptr,
    out_scale_ptr,
    expert_of_ptr,
    used_ptr,
    N: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
    SCALE_PER_ROW: gl.constexpr,
    SCALE_PER_COL: gl.constexpr,
    ALPHA: gl.constexpr,  # this and the next two: of `swiglu`, where two parts are beside each other
    OFFSET: gl.constexpr,
    LIMIT: gl.constexpr,
    LOADER: gl.constexpr,  # registers of a thread of the warps that load
    MULTIPLIER: gl.constexpr,  # and of those that multiply
    USE_PDL: gl.constexpr,
):
    """Blocks of 128 rows of one expert times blocks of its outputs; a program computes every so many of them."""
    PARTS: gl.constexpr = w_desc.block_type.shape[0]
    COLS: gl.constexpr = w_desc.block_type.shape[1]
    N_BLOCKS: gl.constexpr = (N // PARTS + COLS - 1) // COLS
    IS_FLOAT16: gl.constexpr = DTYPE == gl.float16
    x_boxes = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_boxes = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    out_boxes = gl.allocate_shared_memory(out_desc.dtype, [2] + out_desc.block_type.shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    used = gl.load(used_ptr)
    gl.warp_specialize(
        [
            (_multiply, (
                x_boxes, w_boxes, out_boxes, full, free, out_desc, bias_ptr, x_scale_ptr, w_scale_ptr, out_scale_ptr,
                expert_of_ptr, used, 0, N, N_BLOCKS, K, GROUP, IS_FLOAT16, SCALE_PER_ROW, SCALE_PER_COL,
                ALPHA, OFFSET, LIMIT,
            )),
            (_multiply, (
                x_boxes, w_boxes, out_boxes, full, free, out_desc, bias_ptr, x_scale_ptr, w_scale_ptr, out_scale_ptr,
                expert_of_ptr, used, 1, N, N_BLOCKS, K, GROUP, IS_FLOAT16, SCALE_PER_ROW, SCALE_PER_COL,
                ALPHA, OFFSET, LIMIT,
            )),
            (_load, (x_desc, w_desc, x_boxes, w_boxes, full, free, expert_of_ptr, used, N_BLOCKS, K, GROUP)),
        ],
        [4, 1],
        [MULTIPLIER, LOADER],
    )  # fmt: skip


_GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
Box = tuple[torch.Tensor, list[int]]


def launch_specialized(
    programs: int, boxes: tuple[Box, Box, Box], numbers: Sequence[torch.Tensor | None], how: dict[str, Any]
) -> None:
    """Launches the kernel.

    Args:
        programs: how many, of all the work.
        boxes: rows, weight and results, and what is moved of them at once, of all rows of a block.
        numbers: the kernel's other tensors.
        how: its constants and launch options.
    """
    (x, (_, block_k)), weight, (out, (_, cols)) = boxes
    alpha, offset, limit = how.pop("GATE") or (None, None, None)
    specialized_product_kernel[(programs,)](
        *(_described(*box) for box in ((x, [GROUP_ROWS, block_k]), weight, (out, [GROUP_ROWS, cols]))), *numbers,
        ALPHA=alpha, OFFSET=offset, LIMIT=limit, LOADER=LOADER_REGISTERS, MULTIPLIER=GROUP_REGISTERS,
        maxnreg=MOST_REGISTERS, **how,
    )  # fmt: skip


def _described(tensor: torch.Tensor, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(box, _GLUON_DTYPES[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, box, layout)
