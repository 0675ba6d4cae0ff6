"""Float8 (e4m3fn) values from wider ones: static scales, and one dynamic scale per token.

Everywhere: quantized = round(clamp(x / scale, -448, 448)), computed in float32, rounded to nearest even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.launch import (
    float8_storage,
    has_float8,
    launch_options,
    next_power_of_2,
    use_pdl,
)

STATIC_BLOCK = 2048  # values per program of 4 warps: 16 a thread
PER_TOKEN_VALUES_PER_WARP = 512  # 16 a thread
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)  # positive float32
LEAST_AMAX = 1e-10  # of a token, so that the scale of a zero row is not zero


@triton.jit
def to_float8(x: tl.tensor, NATIVE: tl.constexpr) -> tl.tensor:
    """Rounds float32 values to float8_e4m3fn, saturating; as uint8 bit patterns unless NATIVE."""
    x = tl.clamp(x, -448.0, 448.0, tl.PropagateNan.ALL)
    if NATIVE:
        code = x.to(tl.float8e4nv)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Normal values: round the 23-bit mantissa to 3 bits, half to even, and move the exponent's bias from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 the step is 2**-9, which is the last bit of a float32 just above 2**14.
        tiny = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, tiny, normal)
        code = tl.where(x != x, 0x7F, code) | ((bits >> 24) & 0x80)
        code = code.to(tl.uint8)
    return code


@triton.jit
def to_scaled_float8(x: tl.tensor, scale: tl.tensor, NATIVE: tl.constexpr) -> tl.tensor:
    """Rounds float32 values divided by a scale to float8_e4m3fn; see `to_float8`.

    Where all values have one scale its inverse is taken once, and each quotient corrected by its remainder (Markstein
    1990): that rounds to the float8 of the exact one, without a division each. Scales are taken as normal numbers.
    """
    if NATIVE:
        scale = tl.maximum(scale, SMALLEST_NORMAL)
        inverse = tl.div_rn(1.0, scale)
        quotient = tl.clamp(x * inverse, -1e4, 1e4, tl.PropagateNan.ALL)  # beyond, an infinity would have no remainder
        quotient = tl.fma(tl.fma(quotient, scale, -x), -inverse, quotient)  # in this order zero keeps its sign
    else:
        quotient = tl.div_rn(x, scale)
    return to_float8(quotient, NATIVE)


@triton.jit
def from_float8(code: tl.tensor, NATIVE: tl.constexpr) -> tl.tensor:
    """Widens float8_e4m3fn values (uint8 bit patterns unless NATIVE) to float32; finite ones only unless NATIVE."""
    if NATIVE:
        value = code.to(tl.float32)
    else:
        bits = code.to(tl.uint32)
        # Exponent and mantissa moved under float32's exponent: too small by 2**(127 - 7), also for subnormals.
        value = (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return value


@triton.jit
def _quantize_kernel(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """One BLOCK of one row, divided by one scale."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    scale = tl.load(scale_ptr).to(tl.float32)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * row_stride + cols, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + cols, to_scaled_float8(x, scale, NATIVE_FLOAT8), mask)


@triton.jit
def _quantize_per_token_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    row_stride: tl.tensor,
    LEAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """One row, divided by its largest magnitude over 448."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * row_stride + cols, mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=0), LEAST), 448.0)
    tl.store(out_ptr + row * WIDTH + cols, to_scaled_float8(x, scale, NATIVE_FLOAT8), mask)
    tl.store(scales_ptr + row, scale)


def quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Divides x [T, K] by ``scale`` [] float32 (a constant of the model) and rounds to float8_e4m3fn [T, K]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    if num_rows:
        _quantize_kernel[(num_rows, -(-width // STATIC_BLOCK))](
            x,
            scale,
            float8_storage(out),
            x.stride(0),
            WIDTH=width,
            BLOCK=STATIC_BLOCK,
            NATIVE_FLOAT8=has_float8(),
            USE_PDL=use_pdl(),
            num_warps=4,
            **launch_options(),
        )
    return out


def quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of x [T, K] to float8_e4m3fn with a scale of its own: its largest magnitude over 448.

    Returns:
        The values [T, K] and the scales [T, 1] float32; x is about values * scales.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    if num_rows:
        block = next_power_of_2(width)
        _quantize_per_token_kernel[(num_rows,)](
            x,
            float8_storage(out),
            scales,
            x.stride(0),
            LEAST=LEAST_AMAX,
            WIDTH=width,
            BLOCK=block,
            NATIVE_FLOAT8=has_float8(),
            USE_PDL=use_pdl(),
            num_warps=min(16, max(1, block // PER_TOKEN_VALUES_PER_WARP)),
            **launch_options(),
        )
    return out, scales
