"""Root-mean-square norm, with the residual's addition before it and float8 quantization after it in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.triton.launch import (
    float8_storage,
    has_float8,
    launch_options,
    next_power_of_2,
    use_pdl,
)
from lamella_core.kernels.triton.quantize import to_scaled_float8

VALUES_PER_WARP = 512  # 16 a thread: two 16-byte loads of each operand
FEW_ROWS = 16  # up to which there are twice as many warps: 0.4 us less for one row
MOST_WARPS = 16
SMALL_TILE = 2048  # values per program where rows are shorter: several rows share a program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    x_head_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    QUANTIZE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """ROWS rows of H values per program, HEADS rows to a token; statistics in float32.

    The normed value is rounded before the weight, but not before 1 + weight.
    """
    cols = tl.arange(0, BLOCK)[None, :]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    in_row = cols < H
    mask = in_row if ROWS == 1 else in_row & (rows < num_rows)
    weight = tl.load(weight_ptr + cols, in_row, other=0.0)
    out_scale = tl.load(out_scale_ptr).to(tl.float32) if QUANTIZE else 1.0
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = rows.to(tl.int64)
    starts = rows * x_stride if HEADS == 1 else rows // HEADS * x_stride + rows % HEADS * x_head_stride
    x = tl.load(x_ptr + starts + cols, mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * residual_stride + cols, mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + rows * H + cols, x, mask)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / H
    factor = tl.rsqrt(mean + eps)[:, None]
    if UNIT_OFFSET:
        normed = (wide * factor * (weight.to(tl.float32) + 1.0)).to(x.dtype)
    else:
        normed = (wide * factor).to(x.dtype).to(tl.float32)
        normed = (normed * weight.to(tl.float32)).to(x.dtype)
    if QUANTIZE:
        code = to_scaled_float8(normed.to(tl.float32), out_scale, NATIVE_FLOAT8)
        tl.store(out_ptr + rows * H + cols, code, mask)
    else:
        tl.store(out_ptr + rows * H + cols, normed, mask)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of x (plus residual), rounded where Hugging Face models round.

    Args:
        x: [T, H], float32, bfloat16 or float16; rows may be apart, values of a row are side by side.
        weight: [H], contiguous; multiplied after the cast back to x's dtype.
        eps: added to the mean square.
        residual: [T, H] of x's dtype, added first and rounded to it.
        out_scale: [] float32; if given the normed rows come as float8_e4m3fn, divided by it.
        unit_offset: multiply by 1 + weight instead, in float32, before the cast.

    Returns:
        The normed rows, and the sum that was normed (x itself without a residual): both [T, H].
    """
    if weight.dtype is not x.dtype or x.dtype not in DTYPES or x.stride(1) != 1:
        return reference.rms_norm(x, weight, eps, residual, unit_offset)  # rare; the offer of a scale is left
    dtype = x.dtype if out_scale is None else torch.float8_e4m3fn
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x.unsqueeze(1), weight, eps, out, residual, total, out_scale, unit_offset)
    return out, total


def head_rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm of each head of x [T, heads, D] by itself, e.g. of a view of the fused projection.

    Args:
        x: float32, bfloat16 or float16; tokens and heads may be apart, values of a head are side by side.
        weight: [D], contiguous; the same for all heads.
        eps: added to the mean square.
        unit_offset: as for `rms_norm`.

    Returns:
        The normed heads [T, heads, D], contiguous.
    """
    if weight.dtype is not x.dtype or x.dtype not in DTYPES or x.stride(2) != 1:
        return reference.rms_norm(x, weight, eps, None, unit_offset)[0].contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, weight, eps, out, None, out, None, unit_offset)
    return out


def _launch(
    x: Tensor,  # [T, heads, H], each head normed by itself
    weight: Tensor,
    eps: float,
    out: Tensor,
    residual: Tensor | None,
    total: Tensor,
    out_scale: Tensor | None,
    unit_offset: bool,
) -> None:
    num_rows, width = x.shape[0] * x.shape[1], x.shape[2]
    if num_rows == 0:
        return
    block = next_power_of_2(width)
    rows = max(1, SMALL_TILE // block)
    per_warp = VALUES_PER_WARP // 2 if num_rows <= FEW_ROWS else VALUES_PER_WARP
    _rms_norm_kernel[(-(-num_rows // rows),)](
        x,
        x if residual is None else residual,
        weight,
        out if out_scale is None else float8_storage(out),
        total,
        out_scale,
        num_rows,
        x.stride(0),
        x.stride(1),
        0 if residual is None else residual.stride(0),
        eps,
        H=width,
        HEADS=x.shape[1],
        BLOCK=block,
        ROWS=rows,
        HAS_RESIDUAL=residual is not None,
        UNIT_OFFSET=unit_offset,
        QUANTIZE=out_scale is not None,
        NATIVE_FLOAT8=has_float8(),
        USE_PDL=use_pdl(),
        num_warps=min(MOST_WARPS, max(1, block * rows // per_warp)),
        **launch_options(),
    )
