"""Sum over GPUs, the residual's addition and the root-mean-square norm in one kernel, for few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.exchange import (
    ELEMENTS,
    MOST_WORDS,
    Peers,
    can_sum,
    first_elements,
    join_elements,
    num_warps,
    second_elements,
    sum_words,
)
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl
from lamella_core.kernels.triton.quantize import to_float8


@triton.jit
def _normed(words, weight, eps, H: tl.constexpr, ELEMENT: tl.constexpr, UNIT_OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """Norms a row of H elements, zero beyond; rounds as `rms_norm` does."""
    first, second = first_elements(words, ELEMENT), second_elements(words, ELEMENT)
    factor = tl.rsqrt(tl.sum(first * first + second * second, axis=0) / H + eps)
    first, second = first * factor, second * factor
    if UNIT_OFFSET:
        first *= first_elements(weight, ELEMENT) + 1.0
        second *= second_elements(weight, ELEMENT) + 1.0
    else:
        rounded = join_elements(first, second, ELEMENT)
        first = first_elements(rounded, ELEMENT) * first_elements(weight, ELEMENT)
        second = second_elements(rounded, ELEMENT) * second_elements(weight, ELEMENT)
    return join_elements(first, second, ELEMENT)


@triton.jit
def _as_float8(words, scale, ELEMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two float8 values in 16 bits for each word of two elements, divided by the scale.

    Rounded in integers: bit patterns of the device's own conversion came out at other places on an H200.
    """
    low = to_float8(tl.div_rn(first_elements(words, ELEMENT), scale), False)
    high = to_float8(tl.div_rn(second_elements(words, ELEMENT), scale), False)
    return (low.to(tl.uint16) | (high.to(tl.uint16) << 8)).to(tl.int16)


@triton.jit(do_not_specialize=["num_rows", "rank"])
def _sum_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    epochs_ptr: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    rank: tl.tensor,
    H: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENT: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    QUANTIZE: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """A row of H elements at a time: its sum over the ranks, the residual's addition and the norm of `rms_norm`."""
    channel = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < ROW_WORDS
    weight = tl.load(weight_ptr + cols, mask, other=0)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    epoch = tl.load(epochs_ptr + channel)
    for row in range(channel, num_rows, tl.num_programs(0)):
        epoch += 1
        start = row * ROW_WORDS
        words = tl.load(x_ptr + start + cols, mask, other=0)
        residual = tl.load(residual_ptr + start + cols, mask, other=0)
        words = sum_words(
            table_ptr, words, mask, epoch, rank, SIZE, RANKS, BLOCK, ELEMENT, NUM_CHANNELS, WIDTH
        )  # fmt: skip
        first = first_elements(words, ELEMENT) + first_elements(residual, ELEMENT)
        words = join_elements(first, second_elements(words, ELEMENT) + second_elements(residual, ELEMENT), ELEMENT)
        tl.store(total_ptr + start + cols, words, mask)
        words = _normed(words, weight, eps, H, ELEMENT, UNIT_OFFSET)
        if QUANTIZE:
            scale = tl.load(out_scale_ptr).to(tl.float32)
            tl.store(out_ptr + start + cols, _as_float8(words, scale, ELEMENT), mask)
        else:
            tl.store(out_ptr + start + cols, words, mask)
    tl.store(epochs_ptr + channel, epoch)


def can_sum_and_norm(x: Tensor, residual: Tensor, weight: Tensor, peers: Peers) -> bool:
    """Whether `sum_and_norm` takes these: rows of whole words that fit into a program's registers."""
    words = x.shape[-1] * x.element_size() // 4
    fits = next_power_of_2(words) * next_power_of_2(peers.size) <= MOST_WORDS
    is_even = x.shape[-1] % 2 == 0 and weight.dtype is x.dtype
    return can_sum(x) and can_sum(residual) and is_even and fits and words <= peers.slot_words


def sum_and_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    peers: Peers,
    out_scale: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns ``rms_norm(sum of the ranks' x, weight, eps, residual, out_scale, unit_offset)`` from one kernel.

    Args:
        x: [T, H], contiguous, this rank's summand.
        residual: [T, H] of x's dtype, contiguous, the same on all ranks.
        weight: [H] of x's dtype, contiguous.
        eps: added to the mean square.
        peers: the ranks.
        out_scale: [] float32; if given the normed rows come as float8_e4m3fn, divided by it; 16-bit x only.
        unit_offset: multiply by 1 + weight.

    Returns:
        The normed rows and what was normed, both [T, H].
    """
    out = torch.empty(x.shape, dtype=x.dtype if out_scale is None else torch.float8_e4m3fn, device=x.device)
    total = torch.empty_like(x)
    num_rows, width = x.shape
    if num_rows == 0:
        return out, total
    words, ranks = width * x.element_size() // 4, next_power_of_2(peers.size)
    block = next_power_of_2(words)
    _sum_norm_kernel[(min(num_rows, peers.num_channels),)](
        x.view(torch.int32),
        residual.view(torch.int32),
        weight.view(torch.int32),
        out.view(torch.int32 if out_scale is None else torch.int16),
        total.view(torch.int32),
        out_scale,
        peers.table,
        peers.epochs,
        num_rows,
        eps,
        peers.rank,
        H=width,
        ROW_WORDS=words,
        SIZE=peers.size,
        RANKS=ranks,
        BLOCK=block,
        ELEMENT=ELEMENTS[x.dtype],
        NUM_CHANNELS=peers.num_channels,
        WIDTH=peers.slot_words,
        UNIT_OFFSET=unit_offset,
        QUANTIZE=out_scale is not None,
        USE_PDL=use_pdl(),
        num_warps=num_warps(block * ranks),
        **launch_options(),
    )
    return out, total
