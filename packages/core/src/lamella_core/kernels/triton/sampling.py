"""Sampling where the logits are: greedy rows by argmax, others by temperature, top-k, top-p, min-p and one draw.

Nothing waits for the host, and the launches depend on shapes alone, so that a step with its sampling can be captured.
The filters and the random numbers mean what the host's sampler means by them; its weights are float64, these are
float32 in exact integer sums, so that a draw may differ only where a random number falls next to a boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton import sampling_filters as filters
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl
from lamella_core.kernels.triton.sampling_draw import draw_kernel, masses_kernel
from lamella_core.kernels.triton.sampling_filters import CHUNK, merge_best, token_or_code

ARGMAX_WARPS = 8  # 16 scores a thread
HISTOGRAM_WARPS = 8
THRESHOLD_WARPS = 16
DRAW_WARPS = 8
HISTOGRAM_PROGRAMS = 512  # of all rows together, at least, where there are so many chunks
LARGEST_VOCAB = 2**19 - 1  # so that 64 bits hold the sum of all weights


@dataclass(frozen=True)
class SamplingRows:
    """How rows of logits are sampled: device tensors, one entry per slot, and which slot each row has.

    Temperature, top_p and min_p may be float32 or float64; float64 holds what the host's sampler computes with.
    """

    temperature: Tensor  # [slots]; 0: greedy
    top_k: Tensor  # [slots] int32; 0: all tokens
    top_p: Tensor  # [slots]; 1: all tokens
    min_p: Tensor  # [slots]; 0: all tokens
    seed_low: Tensor  # [slots] int64: the low 64 bits of the seed
    seed_high: Tensor  # [slots] int64
    slots: Tensor  # [R] int32: slot of each row
    positions: Tensor  # [R] int32: tokens generated so far, the counter of the random numbers


@triton.jit
def _argmax_kernel(
    logits_ptr: tl.tensor,
    values_ptr: tl.tensor,  # [R, CHUNKS] float32
    ids_ptr: tl.tensor,  # [R, CHUNKS] int32
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Grid (R, CHUNKS): the largest score of a chunk, NaN if one is NaN, and the lowest id that has it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(logits_ptr + row * row_stride + cols, cols < VOCAB, other=float("-inf")).to(tl.float32)
    is_nan = x != x
    x = tl.where(is_nan, float("inf"), x)
    best = tl.max(x, axis=0)
    token = tl.min(tl.where(x == best, cols, 2147483647), axis=0)
    if best == float("inf"):
        best = tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, float("nan"), best)
    tl.store(values_ptr + row * CHUNKS + chunk, best)
    tl.store(ids_ptr + row * CHUNKS + chunk, token)


@triton.jit
def _greedy_kernel(
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    CHUNKS: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Grid (R): the best of the chunks' best."""
    row = tl.program_id(0).to(tl.int64)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    best, token = merge_best(values_ptr, ids_ptr, row, CHUNKS)
    tl.store(out_ptr + row, token_or_code(best, token))


def sample(
    logits: Tensor, out: Tensor, *, vocab_size: int, rows: SamplingRows | None = None, greedy: bool = False
) -> None:
    """Writes one token per row of logits to ``out``.

    Args:
        logits: [R, V'], bfloat16, float16 or float32, values of a row side by side; columns from ``vocab_size`` on are
            padding and not read.
        out: [R] int32, written: the token, or a negative code (see `lamella_core.kernels.triton`).
        vocab_size: at most V' and `LARGEST_VOCAB`.
        rows: how each row is sampled; not needed with ``greedy``.
        greedy: every row takes its largest score, the lowest id among equal ones: two launches instead of five.

    Raises:
        ValueError: ``rows`` are missing, or the vocabulary is too large.
    """
    num_rows = logits.shape[0]
    if num_rows == 0:
        return
    chunk = min(CHUNK, next_power_of_2(vocab_size))
    chunks = -(-vocab_size // chunk)
    values = torch.empty((num_rows, chunks), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, chunks), dtype=torch.int32, device=logits.device)
    pdl, options = use_pdl(), launch_options()
    _argmax_kernel[(num_rows, chunks)](
        logits, values, ids, logits.stride(0),
        VOCAB=vocab_size, CHUNKS=chunks, CHUNK=chunk, USE_PDL=pdl, num_warps=ARGMAX_WARPS, **options,
    )  # fmt: skip
    if greedy:
        _greedy_kernel[(num_rows,)](
            values, ids, out, CHUNKS=chunks, USE_PDL=pdl, num_warps=1, **options
        )  # fmt: skip
        return
    if rows is None or vocab_size > LARGEST_VOCAB:
        raise ValueError(
            f"sampling needs rows ({'missing' if rows is None else 'given'}) and a vocabulary of at most "
            f"{LARGEST_VOCAB} tokens, not {vocab_size}; pass greedy=True for the largest scores alone"
        )
    _sample_filtered(logits, out, vocab_size, rows, values, ids)


def _sample_filtered(
    logits: Tensor, out: Tensor, vocab_size: int, rows: SamplingRows, values: Tensor, ids: Tensor
) -> None:
    """The launches after the argmax, when rows may have filters; ``values`` and ``ids`` are its results."""
    num_rows, chunks = values.shape
    stride = logits.stride(0)
    width = next_power_of_2(vocab_size)
    chunk, histogram_block = min(CHUNK, width), min(filters.HISTOGRAM_BLOCK, width)
    device = logits.device
    pdl, options = use_pdl(), launch_options()
    with_histogram = logits.dtype is not torch.float32
    groups = max(1, min(-(-HISTOGRAM_PROGRAMS // num_rows), -(-vocab_size // histogram_block)))
    group_size = -(-vocab_size // (groups * histogram_block)) * histogram_block
    # Each its own allocation: a kernel is compiled once more for pointers that are not aligned.
    counts = torch.empty((num_rows, groups, filters.WINDOW.value), dtype=torch.int32, device=device)
    outside = torch.empty((num_rows, groups), dtype=torch.int64, device=device)
    best, cut = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    threshold, ties = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2))
    masses = torch.empty((num_rows, chunks), dtype=torch.int64, device=device)
    tied = torch.empty((num_rows, chunks), dtype=torch.int32, device=device)
    if with_histogram:
        filters.histogram_kernel[(num_rows, groups)](
            logits, values, ids, counts, outside, rows.temperature, rows.top_k, rows.top_p, rows.slots, stride,
            group_size, VOCAB=vocab_size, CHUNKS=chunks, BLOCK=histogram_block, USE_PDL=pdl,
            num_warps=HISTOGRAM_WARPS, **options,
        )  # fmt: skip
    filters.thresholds_kernel[(num_rows,)](
        logits, values, ids, counts, outside, out, best, threshold, ties, cut,
        rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.slots, stride, groups,
        VOCAB=vocab_size, CHUNKS=chunks, HISTOGRAM=with_histogram, BLOCK=min(filters.BISECTION_BLOCK, width),
        USE_PDL=pdl, num_warps=THRESHOLD_WARPS, **options,
    )  # fmt: skip
    masses_kernel[(num_rows, chunks)](
        logits, best, threshold, ties, cut, masses, tied, rows.temperature, rows.slots, stride,
        VOCAB=vocab_size, CHUNKS=chunks, CHUNK=chunk, USE_PDL=pdl, num_warps=ARGMAX_WARPS, **options,
    )  # fmt: skip
    draw_kernel[(num_rows,)](
        logits, out, best, threshold, ties, cut, masses, tied, rows.temperature, rows.seed_low, rows.seed_high,
        rows.slots, rows.positions, stride, VOCAB=vocab_size, CHUNKS=chunks, CHUNK=chunk,
        USE_PDL=pdl, num_warps=DRAW_WARPS, **options,
    )  # fmt: skip
