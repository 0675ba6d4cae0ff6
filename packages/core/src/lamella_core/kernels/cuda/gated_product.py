"""A gated feed-forward block's first product of many rows, and its activation, in one kernel: ``gated_product.cu``.

Legend: M rows, K numbers of each, F outputs; a pair is what two thread blocks compute at a time, see ``gated_pairs.h``.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lamella_core.kernels.cuda import driver

if TYPE_CHECKING:
    from lamella_core.kernels.fused import SiluGateAfter
    from lamella_core.kernels.matmul import Scales

_FLOAT8 = torch.float8_e4m3fn
_HALVES = (torch.bfloat16, torch.float16)
BLOCK_ROWS, TILE_OUTPUTS = 128, 128  # as in the source, as are these:
_THREADS, _STEP_BYTES, _STORED_BYTES = 384, 128, 16
_SHARED_MEMORY = 4 * (BLOCK_ROWS + 2 * TILE_OUTPUTS) * _STEP_BYTES + 1024 + 2 * 4 * 8  # stages, alignment, barriers
_ALIGNMENT = 16  # bytes, of operands and their rows
# Parts of the multiprocessors' time in which wanted numbers are computed, for up to so many rows, from which on this is
# faster than cuBLASLt's best algorithm and a kernel for the gate: on an H100, for Llama-3.1-8B in float8. The time of
# the fewest rows is that of reading the weights.
LEAST_USED = {256: 0.6, 768: 0.8, math.inf: 0.9}
HALF_TURN = 0.55  # the time of half a pair, in turns: half the products, but as many rows are read


def num_pairs(rows: int, tiles: int) -> int:
    """Returns how many pairs there are for M rows and F outputs in so many tiles."""
    tall, alone = divmod(-(-rows // BLOCK_ROWS), 2)
    return tall * tiles + alone * -(-tiles // 2)


def num_halved(pairs: int, pairs_at_once: int) -> int:
    """Returns how many pairs, the last ones, are computed in halves: those of a last turn that is half empty."""
    left = pairs % pairs_at_once
    return left if 2 * left <= pairs_at_once else 0


def used_part(rows: int, tiles: int, pairs_at_once: int) -> float:
    """Returns the part of the time in which a GPU that computes so many pairs at once computes wanted numbers."""
    pairs = num_pairs(rows, tiles)
    turns = -(-pairs // pairs_at_once) - (1 - HALF_TURN if num_halved(pairs, pairs_at_once) else 0)
    return rows * tiles / (2 * BLOCK_ROWS * turns * pairs_at_once) if pairs else 0.0


def offers(rows: int, weight_rows: int) -> bool:
    """Whether `gated_product` is faster on the current GPU than two kernels, for ``weight_rows`` = 2 F."""
    if not torch.cuda.is_available() or weight_rows % (2 * TILE_OUTPUTS):
        return False
    pairs_at_once = _pairs_at_once(torch.cuda.current_device())
    if not pairs_at_once:
        return False
    least = next(least for most_rows, least in LEAST_USED.items() if rows <= most_rows)
    return used_part(rows, weight_rows // (2 * TILE_OUTPUTS), pairs_at_once) >= least


@functools.cache
def _pairs_at_once(device: int) -> int:
    """Returns 0 for a GPU without the kernel."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count) // 2 if (properties.major, properties.minor) == driver.HOPPER else 0


def gated_product(
    x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None, after: SiluGateAfter
) -> Tensor | None:
    """Returns silu(gate) * up of x times w transposed, [M, F]; see `lamella_core.kernels.fused`. None: not served.

    The product is rounded first. Quotients by ``after.out_scale``, a normal finite number, are the nearest float8; a
    zero may have the other sign.

    Args:
        x: [M, K] bfloat16, float16 or float8_e4m3fn, contiguous, on the current GPU.
        w: [2 F, K] of x's dtype, contiguous; F is a multiple of 128.
        bias: None; others are not served.
        scales: of a float8 product: one of x or one per row, one of the weight.
        after: the scale of a float8 result.
    """
    if bias is not None or not _fits(x, w, scales):
        return None
    rows, width, device = x.shape[0], w.shape[0] // 2, x.device.index
    dtype = x.dtype if scales is None else scales.out_dtype
    quantizes = after.out_scale is not None
    kernel = _kernel(scales is not None, dtype == torch.bfloat16, quantizes, device)
    if kernel is None:
        return None
    out = torch.empty(rows, width, dtype=_FLOAT8 if quantizes else dtype, device=x.device)
    factors = (None, None) if scales is None else (scales.x, scales.w)
    pairs, at_once = num_pairs(rows, width // TILE_OUTPUTS), _pairs_at_once(device)
    halved = num_halved(pairs, at_once)
    params = _maps(x, w, _STORED_BYTES // out.element_size()) + struct.pack(
        "4Q5i", out.data_ptr(), *driver.addresses(*factors, after.out_scale),
        rows, width // TILE_OUTPUTS, -(-x.shape[1] * x.element_size() // _STEP_BYTES),
        scales is not None and scales.x.numel() > 1, halved,
    )  # fmt: skip
    kernel.launch(2 * min(pairs + halved, at_once), params, device)
    return out


def _fits(x: Tensor, w: Tensor, scales: Scales | None) -> bool:
    """Whether the kernel serves operands of such sizes and places, with such scales."""
    rows, k = x.shape
    if not x.is_cuda or not rows or x.dtype != w.dtype or x.dtype not in (*_HALVES, _FLOAT8):
        return False
    if not _pairs_at_once(x.device.index) or (x.dtype == _FLOAT8) != (scales is not None):
        return False
    if scales is not None and (
        scales.w.numel() != 1 or scales.x.numel() not in (1, rows) or scales.out_dtype not in _HALVES
    ):
        return False
    if w.shape[0] % (2 * TILE_OUTPUTS) or k * x.element_size() % _ALIGNMENT:
        return False
    return all(part.is_contiguous() and part.data_ptr() % _ALIGNMENT == 0 for part in (x, w))


@functools.cache
def _kernel(is_float8: bool, is_bfloat16: bool, quantizes: bool, device: int) -> driver.Kernel | None:
    """Returns the kernel for a GPU; None where it cannot be compiled or loaded."""
    macros = {"FLOAT8": is_float8, "BFLOAT16": is_bfloat16, "OUT_FLOAT8": quantizes}
    return driver.load(
        "gated_product", macros, threads=_THREADS, shared_memory=_SHARED_MEMORY, device=device,
        otherwise="gates follow products in kernels of their own",
    )  # fmt: skip


def _maps(x: Tensor, w: Tensor, run: int) -> bytes:
    """Returns the maps of both operands; ``run`` outputs of a thread are side by side."""
    k, size, width = x.shape[1], x.element_size(), w.shape[0] // 2
    step, row_bytes = _STEP_BYTES // size, k * size
    x_map = driver.tensor_map(x.data_ptr(), x.dtype, (k, x.shape[0]), (row_bytes,), (step, BLOCK_ROWS // 2))
    strides = tuple(rows * row_bytes for rows in (width, run, 1, 4 * run))
    sizes, box = (k, 2, 4, run, width // (4 * run)), (step, 2, 4, run, 1)
    return x_map + driver.tensor_map(w.data_ptr(), w.dtype, sizes, strides, box)
