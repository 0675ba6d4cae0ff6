"""Products of up to 4 rows that begin with the RMS norm of their inputs: norm(x + residual) times w transposed.

Every program norms all rows for itself, while its first weights are on their way, and keeps them in registers; it then
goes through several blocks of outputs. That repeats a norm of few kilobytes from the L2 cache some hundred times, and
saves a kernel with its boundaries. Each program writes its part of x + residual.

Shape legend: as in `lamella_core.kernels.triton.gemv`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella_core.kernels.fused import RmsNormBefore, SiluGateAfter
from lamella_core.kernels.matmul import Scales
from lamella_core.kernels.triton.gemv import MOST_VECTOR_ROWS, TRITON_DTYPES, empty_output, finish, weight_rows
from lamella_core.kernels.triton.launch import (
    float8_storage,
    has_float8,
    is_interpreted,
    launch_options,
    next_power_of_2,
    use_pdl,
)
from lamella_core.kernels.triton.quantize import from_float8, to_float8

MOST_VALUES = 128  # of all rows that a thread holds
REGISTERS = 65536  # of a multiprocessor, for the programs that it runs at once
FEWEST_REGISTERS, MOST_REGISTERS = 64, 255  # of a thread; with fewer, programs rather wait for each other
INTERPRETED_PROCESSORS = 2


@dataclass(frozen=True, slots=True)
class NormedTile:
    """How `_normed_kernel` divides the work.

    Attributes:
        block_n: outputs at a time.
        num_warps: warps per program, all along K.
        per_processor: programs for each multiprocessor, at most.
        ahead: read the next block's weights before the last one's are used.
    """

    block_n: int
    num_warps: int
    per_processor: int
    ahead: bool = True


@triton.jit
def _load_block(  # type: ignore[no-untyped-def]
    w_ptr, k, block, n, K: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr
):
    """Returns the weights of a block of outputs [STEPS, LANES, BLOCK_N, 1, VEC]; zeros past the last block."""
    first, row, inside = weight_rows(block, n, BLOCK_N, GATED)
    at = w_ptr + first.to(tl.int64) * K + row[None, None, :, None, None] * K + k
    mask = inside[None, None, :, None, None] & (EVEN | (k < K))
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["m"])
def _normed_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K], rows stride_x apart
    residual_ptr,  # [M, K], rows stride_residual apart, or None
    gain_ptr,  # [K], the norm's weight
    total_ptr,  # [M, K], or None without a residual
    w_ptr,  # [N, K]
    out_ptr,  # [M, N], or [M, N / 2] if GATED
    bias_ptr,  # [N] or None
    x_scale_ptr,  # [] float32, or None
    w_scale_ptr,  # [] or [N] float32, or None
    out_scale_ptr,  # [] float32, or None
    m,
    n,
    stride_x,
    stride_residual,
    eps,
    K: tl.constexpr,
    STEPS: tl.constexpr,  # power of two; STEPS * LANES * VEC >= K
    LANES: tl.constexpr,  # threads of the program
    VEC: tl.constexpr,  # weight elements in 16 bytes
    ROWS: tl.constexpr,  # least power of two that holds M
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,  # the norm multiplies by 1 + gain
    DTYPE: tl.constexpr,  # from here on as in `finish`
    SCALED: tl.constexpr,
    SCALE_PER_COL: tl.constexpr,
    GATED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    EVEN: tl.constexpr = K == STEPS * LANES * VEC
    step = tl.arange(0, STEPS)[:, None, None, None, None]
    lane = tl.arange(0, LANES)[None, :, None, None, None]
    k = (step * LANES + lane) * VEC + tl.arange(0, VEC)[None, None, None, None, :]
    row = tl.arange(0, ROWS)[None, None, None, :, None]
    program, programs = tl.program_id(0), tl.num_programs(0)
    w = _load_block(w_ptr, k, program, n, K, BLOCK_N, EVEN, GATED)
    gain = tl.load(gain_ptr + k, mask=EVEN | (k < K), other=0.0)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    inside = (row < m) & (EVEN | (k < K))
    x = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0)  # [STEPS, LANES, 1, ROWS, VEC]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_residual + k, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        part = tl.cdiv(tl.cdiv(K, VEC), programs) * VEC
        mine = (k >= program * part) & (k < (program + 1) * part)
        tl.store(total_ptr + row * K + k, x, mask=inside & mine)
    wide = x.to(tl.float32)
    squares = tl.sum(tl.sum(tl.sum(wide * wide, axis=4), axis=0), axis=0)  # [1, ROWS]
    factor = tl.rsqrt(squares / K + eps)[None, None, :, :, None]
    if UNIT_OFFSET:
        x = (wide * factor * (gain.to(tl.float32) + 1.0)).to(x.dtype)
    else:
        x = (wide * factor).to(x.dtype)
        x = (x.to(tl.float32) * gain.to(tl.float32)).to(x.dtype)
    if SCALED:
        x = to_float8(tl.div_rn(x.to(tl.float32), tl.load(x_scale_ptr).to(tl.float32)), NATIVE_FLOAT8)

    blocks = tl.cdiv(n, BLOCK_N)
    for block in range(program, blocks, programs):
        if AHEAD:
            next_w = _load_block(w_ptr, k, block + programs, n, K, BLOCK_N, EVEN, GATED)
        factors = from_float8(x, NATIVE_FLOAT8) if SCALED else x.to(tl.float32)
        acc = tl.sum(tl.sum(w.to(tl.float32) * factors, axis=4), axis=0)  # [LANES, BLOCK_N, ROWS]
        total = tl.trans(tl.sum(acc, axis=0))
        first, w_row, w_row_inside = weight_rows(block, n, BLOCK_N, GATED)
        finish(
            total, first, w_row, w_row_inside, out_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, out_scale_ptr, m, n,
            DTYPE, SCALED, False, SCALE_PER_COL, GATED, QUANTIZE, NATIVE_FLOAT8,
        )  # fmt: skip
        if AHEAD:
            w = next_w
        else:
            w = _load_block(w_ptr, k, block + programs, n, K, BLOCK_N, EVEN, GATED)


def normed_matmul(
    x: Tensor,
    w: Tensor,
    norm: RmsNormBefore,
    bias: Tensor | None = None,
    scales: Scales | None = None,
    *,
    gate: SiluGateAfter | None = None,
    tile: NormedTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns norm(x + residual) times w transposed plus bias, or what ``gate`` makes of it, and x + residual [M, K].

    Rounds where `lamella_core.kernels.triton.norm.rms_norm` rounds; the mean square is summed in another order.

    Args:
        x: [M, K], bf16 or fp16; its rows are contiguous. M is at most `MOST_VECTOR_ROWS`.
        w: [N, K] of x's dtype or float8_e4m3fn, contiguous; K is a multiple of 16.
        norm: its weight and residual are of x's dtype.
        bias: [N] of x's dtype.
        scales: of a float8 product, by whose scale of x [] the normed rows are quantized.
        gate: the result is silu(gate) * up of the product's halves. N is even.
        tile: how to divide the work; None: `default_tile`.

    Raises:
        ValueError: M or K is more than the kernel takes, see `serves`.
    """
    m, k = x.shape
    n = w.shape[0]
    if not serves(m, k):
        raise ValueError(f"x [{m}, {k}] is more than this kernel takes (see `serves`); norm it in a kernel before")
    tile = tile or default_tile(m, n, k, w.element_size())
    out = empty_output(m, n, x.dtype, gate, x.device)
    total = x if norm.residual is None else torch.empty((m, k), dtype=x.dtype, device=x.device)
    if m == 0:
        return out, total
    lanes, vec = 32 * tile.num_warps, 16 // w.element_size()
    quantize = gate is not None and gate.out_scale is not None
    blocks = -(-n // tile.block_n)
    _normed_kernel[(min(blocks, tile.per_processor * _processors(x.device)),)](
        x,
        norm.residual,
        norm.weight,
        None if norm.residual is None else total,
        w,
        float8_storage(out) if quantize else out,
        bias,
        None if scales is None else scales.x,
        None if scales is None else scales.w,
        None if gate is None else gate.out_scale,
        m,
        n,
        x.stride(0),
        0 if norm.residual is None else norm.residual.stride(0),
        norm.eps,
        K=k,
        STEPS=next_power_of_2(-(-k // (lanes * vec))),
        LANES=lanes,
        VEC=vec,
        ROWS=next_power_of_2(m),
        BLOCK_N=tile.block_n,
        AHEAD=tile.ahead,
        UNIT_OFFSET=norm.unit_offset,
        DTYPE=TRITON_DTYPES[x.dtype],
        SCALED=scales is not None,
        SCALE_PER_COL=scales is not None and scales.w.numel() > 1,
        GATED=gate is not None,
        QUANTIZE=quantize,
        NATIVE_FLOAT8=has_float8(),
        USE_PDL=use_pdl(),
        num_warps=tile.num_warps,
        maxnreg=_most_registers(lanes * tile.per_processor),
        **launch_options(),
    )
    return out, total


def serves(m: int, k: int) -> bool:
    """Whether rows of so many inputs fit the registers of a program of 8 warps."""
    return m <= MOST_VECTOR_ROWS and next_power_of_2(m) * next_power_of_2(k) <= MOST_VALUES * 256


@functools.lru_cache(maxsize=1024)
def default_tile(m: int, n: int, k: int, itemsize: int) -> NormedTile:
    """Returns the tile for a product of m rows by a weight [n, k] of ``itemsize`` bytes per number.

    All programs must be on the processors at once, for none would take over another's blocks.
    """
    if k <= 4096 and m <= 2:
        return NormedTile(block_n=2, num_warps=4, per_processor=4) if m == 1 else NormedTile(4, 8, 2)
    return NormedTile(block_n=2, num_warps=8, per_processor=2)


def _most_registers(threads: int) -> int:
    """Returns registers per thread with which so many fit a multiprocessor; the most there are if they would be few."""
    registers = REGISTERS // threads // 8 * 8
    return registers if FEWEST_REGISTERS <= registers <= MOST_REGISTERS else MOST_REGISTERS


@functools.cache
def _processors(device: torch.device) -> int:
    if is_interpreted():
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
