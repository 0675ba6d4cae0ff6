"""Kernels that draw a token from what the filters left: the mass of every chunk, then the place of a random number.

Inverse-CDF sampling in the order of token ids, with the random number of (seed, position) alone: the token does not
depend on the batch. See `lamella_core.kernels.triton.sampling_filters` for weights, thresholds and ties.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.sampling_filters import DONE, key_of, random_word, rate_of, value_of, weight_of


@triton.jit
def masses_kernel(
    logits_ptr: tl.tensor,
    best_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    ties_ptr: tl.tensor,
    cut_ptr: tl.tensor,
    masses_ptr: tl.tensor,  # [R, CHUNKS] int64: of the scores above the threshold
    tied_ptr: tl.tensor,  # [R, CHUNKS] int32: how many scores equal the threshold
    temperature_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Grid (R, CHUNKS)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    if tl.load(ties_ptr + row) != DONE:
        rate = rate_of(tl.load(temperature_ptr + tl.load(slots_ptr + row)))
        best = tl.load(best_ptr + row)
        threshold = tl.load(threshold_ptr + row)
        x = tl.load(logits_ptr + row * row_stride + cols, cols < VOCAB, other=float("-inf"))
        key = key_of(x)
        live = (cols < VOCAB) & (x.to(tl.float32) >= tl.load(cut_ptr + row))
        mass = tl.sum(tl.where(live & (key > threshold), weight_of(x, best, rate), 0), axis=0)
        tied = tl.sum((live & (key == threshold)).to(tl.int32), axis=0)
        tl.store(masses_ptr + row * CHUNKS + chunk, mass)
        tl.store(tied_ptr + row * CHUNKS + chunk, tied)


@triton.jit
def draw_kernel(
    logits_ptr: tl.tensor,
    out_ptr: tl.tensor,
    best_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    ties_ptr: tl.tensor,
    cut_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    tied_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    seed_low_ptr: tl.tensor,
    seed_high_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Grid (R): finds the chunk, then the token, where the running mass passes the random share of the total."""
    row = tl.program_id(0).to(tl.int64)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    ties = tl.load(ties_ptr + row)
    if ties != DONE:
        slot = tl.load(slots_ptr + row)
        key0 = tl.load(seed_low_ptr + slot).to(tl.uint64, bitcast=True)
        key1 = tl.load(seed_high_ptr + slot).to(tl.uint64, bitcast=True)
        word = random_word(tl.load(positions_ptr + row), key0, key1)
        rate = rate_of(tl.load(temperature_ptr + slot))
        best = tl.load(best_ptr + row)
        threshold = tl.load(threshold_ptr + row)
        tie_weight = weight_of(value_of(threshold, logits_ptr.dtype.element_ty), best, rate)

        at = tl.arange(0, triton.next_power_of_2(CHUNKS))
        mass = tl.load(masses_ptr + row * CHUNKS + at, at < CHUNKS, other=0)
        tied = tl.load(tied_ptr + row * CHUNKS + at, at < CHUNKS, other=0)
        tied_before = tl.cumsum(tied, axis=0) - tied
        mass += tl.minimum(tl.maximum(ties - tied_before, 0), tied) * tie_weight
        up_to = tl.cumsum(mass, axis=0)
        total = tl.sum(mass, axis=0).to(tl.uint64)
        target = tl.umulhi((word >> 11) << 11, total).to(tl.int64)  # the 53 random bits times the total, rounded down
        chunk = tl.sum((up_to <= target).to(tl.int32), axis=0)
        target -= tl.sum(tl.where(at < chunk, mass, 0), axis=0)
        ties -= tl.sum(tl.where(at < chunk, tied, 0), axis=0)

        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row * row_stride + cols, cols < VOCAB, other=float("-inf"))
        key = key_of(x)
        live = (cols < VOCAB) & (x.to(tl.float32) >= tl.load(cut_ptr + row))
        is_tied = live & (key == threshold)
        rank = tl.cumsum(is_tied.to(tl.int32), axis=0)  # 1 for the first
        kept = (live & (key > threshold)) | (is_tied & (rank <= ties))
        running = tl.cumsum(tl.where(kept, weight_of(x, best, rate), 0), axis=0)
        place = tl.sum((running <= target).to(tl.int32), axis=0)
        tl.store(out_ptr + row, chunk * CHUNK + place)
