"""The gated activation of an MLP, silu(gate) * up, with float8 quantization in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.launch import float8_storage, has_float8, launch_options, use_pdl
from lamella_core.kernels.triton.quantize import to_scaled_float8

BLOCK = 1024  # outputs per program
NUM_WARPS = 4  # 8 outputs a thread: one 16-byte load of gate and of up


@triton.jit
def gated_silu(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    """silu(gate) * up in gate's dtype; float32 inside, rounded once."""
    wide = gate.to(tl.float32)
    return (wide / (1.0 + tl.exp(-wide)) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    row_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """One BLOCK of one row's WIDTH outputs; float32 inside, rounded once (and once more before quantization)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    out_scale = tl.load(out_scale_ptr).to(tl.float32) if QUANTIZE else 1.0
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    source = gate_up_ptr + row * row_stride + cols
    gate = tl.load(source, mask, other=0.0)
    y = gated_silu(gate, tl.load(source + WIDTH, mask, other=0.0))
    if QUANTIZE:
        code = to_scaled_float8(y.to(tl.float32), out_scale, NATIVE_FLOAT8)
        tl.store(out_ptr + row * WIDTH + cols, code, mask)
    else:
        tl.store(out_ptr + row * WIDTH + cols, y, mask)


def silu_and_mul(gate_up: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """Gated activation silu(gate) * up in float32 for rows [gate, up].

    Args:
        gate_up: [T, 2I], float32, bfloat16 or float16, values of a row side by side.
        out_scale: [] float32; if given the result is float8_e4m3fn, divided by it after the cast to gate_up's dtype.

    Returns:
        [T, I], in gate_up's dtype or float8_e4m3fn.
    """
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    quantize = out_scale is not None
    out = torch.empty(
        (num_rows, width), dtype=torch.float8_e4m3fn if quantize else gate_up.dtype, device=gate_up.device
    )
    if num_rows == 0:
        return out
    _silu_and_mul_kernel[(num_rows, -(-width // BLOCK))](
        gate_up,
        float8_storage(out) if quantize else out,
        out_scale,
        gate_up.stride(0),
        WIDTH=width,
        BLOCK=BLOCK,
        QUANTIZE=quantize,
        NATIVE_FLOAT8=has_float8(),
        USE_PDL=use_pdl(),
        num_warps=NUM_WARPS,
        **launch_options(),
    )
    return out
