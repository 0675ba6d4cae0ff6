"""Kernels that sample rows by temperature, top-k, top-p and min-p; `lamella_core.kernels.triton.sampling` calls them.

Exact and independent of the batch by construction. A weight exp((x - max) / temperature) is a float32 turned into an
integer number of 2**-44, so every sum of weights is an exact 64-bit integer and no order of summation matters. A score
is compared by its key, an integer in the order of the floats. What is left of a row is described by a `threshold`
key: all scores above it, and of those that equal it the ``ties`` first ones; and by a ``cut`` that min-p sets.

The threshold comes from counting scores per key in a window of WINDOW keys below the largest, where a 16-bit float has
few enough keys: counts give both the k-th score and, times the weight of the key, the mass. Below the window, and for
float32, it is found by bisection, one pass over the row per bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton import NAN_LOGITS, NEGATIVE_INFINITE_LOGITS, POSITIVE_INFINITE_LOGITS

CHUNK = 4096  # scores of a row whose mass is one partial sum
HISTOGRAM_BLOCK = 8192  # scores per histogram in registers, merged through shared memory
BISECTION_BLOCK = 8192

# Known to the kernels. ``DONE``, among the ties, says that a row has its token.
WINDOW = tl.constexpr(1024)  # keys: eight octaves of bfloat16
NO_THRESHOLD = tl.constexpr(-(2**31))  # below every key
ALL_TIES = tl.constexpr(2**31 - 1)
DONE = tl.constexpr(-(2**31))
_NAN = tl.constexpr(NAN_LOGITS)
_POSITIVE = tl.constexpr(POSITIVE_INFINITE_LOGITS)
_NEGATIVE = tl.constexpr(NEGATIVE_INFINITE_LOGITS)


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """Returns int32 keys in the order of x, float32 or 16 bits wide; -0.0 has the key of 0.0."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 15) & 0x7FFF)
    return tl.where(key == -1, 0, key)


@triton.jit
def value_of(key: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Returns the float32 value of keys of ``dtype`` scores."""
    if dtype == tl.float32:
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        value = (key ^ ((key >> 15) & 0x7FFF)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return value


@triton.jit
def weight_of(x: tl.tensor, best: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """Returns exp2((x - best) * rate) in units of 2**-44, int64; 2**44 where x is best, whatever the rate."""
    wide = x.to(tl.float32)
    weight = tl.where(wide == best, 1.0, tl.exp2((wide - best) * rate))
    return (weight * 17592186044416.0).to(tl.int64)


@triton.jit
def rate_of(temperature: tl.tensor) -> tl.tensor:
    """Returns log2(e) / temperature, float32."""
    return (1.4426950408889634 / temperature.to(tl.float64)).to(tl.float32)


@triton.jit
def random_word(position: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tensor:
    """Returns word 0 of the Philox4x64-10 block with counter (position, 0, 0, 0), uint64 (Salmon et al., SC 2011)."""
    c0 = position.to(tl.uint64)
    c1 = c0 ^ c0
    c2 = c1
    c3 = c1
    for _ in tl.static_range(10):
        left = tl.umulhi(c0, 0xD2E7470EE14C6C93)
        right = tl.umulhi(c2, 0xCA5A826395121157)
        low_left = c0 * 0xD2E7470EE14C6C93
        low_right = c2 * 0xCA5A826395121157
        c0 = right ^ c1 ^ key0
        c1 = low_right
        c2 = left ^ c3 ^ key1
        c3 = low_left
        key0 = key0 + 0x9E3779B97F4A7C15
        key1 = key1 + 0xBB67AE8584CAA73B
    return c0


@triton.jit
def merge_best(values_ptr: tl.tensor, ids_ptr: tl.tensor, row: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """Returns the largest score of a row (NaN if one is NaN), its lowest id, from the partial results [R, CHUNKS]."""
    at = tl.arange(0, triton.next_power_of_2(CHUNKS))
    value = tl.load(values_ptr + row * CHUNKS + at, at < CHUNKS, other=float("-inf"))
    index = tl.load(ids_ptr + row * CHUNKS + at, at < CHUNKS, other=2147483647)
    is_nan = tl.max((value != value).to(tl.int32), axis=0)
    best = tl.max(tl.where(value != value, float("-inf"), value), axis=0)
    token = tl.min(tl.where(value == best, index, 2147483647), axis=0)
    return tl.where(is_nan > 0, float("nan"), best), token


@triton.jit
def token_or_code(best: tl.tensor, token: tl.tensor) -> tl.tensor:
    """Returns the token, or the code of a row that cannot be sampled."""
    token = tl.where(best == float("-inf"), _NEGATIVE, token)
    token = tl.where(best == float("inf"), _POSITIVE, token)
    return tl.where(best != best, _NAN, token)


@triton.jit
def histogram_kernel(
    logits_ptr: tl.tensor,
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,  # [R, groups, WINDOW] int32: scores whose key is the largest key minus the place
    outside_ptr: tl.tensor,  # [R, groups] int64: mass below the window
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    row_stride: tl.tensor,
    group_size: tl.tensor,  # scores per program, a multiple of BLOCK
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Grid (R, groups): counts the scores per key, for rows with top-k or top-p."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    best, _ = merge_best(values_ptr, ids_ptr, row, CHUNKS)
    filtered = ((top_k > 0) & (top_k < VOCAB)) | (tl.load(top_p_ptr + slot) < 1.0)
    if filtered & (temperature > 0.0) & (tl.abs(best) < float("inf")):
        rate = rate_of(temperature)
        top = key_of(best.to(logits_ptr.dtype.element_ty))
        counts = tl.zeros([WINDOW], dtype=tl.int32)
        outside = tl.zeros([BLOCK], dtype=tl.int64)
        first = group * group_size
        for start in range(first, first + group_size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * row_stride + cols, cols < VOCAB, other=float("-inf"))
            place = top - key_of(x)
            counts += tl.histogram(place, WINDOW, mask=(cols < VOCAB) & (place < WINDOW))
            outside += tl.where(place < WINDOW, 0, weight_of(x, best, rate))
        at = row * tl.num_programs(1) + group
        tl.store(counts_ptr + at * WINDOW + tl.arange(0, WINDOW), counts)
        tl.store(outside_ptr + at, tl.sum(outside, axis=0))


@triton.jit
def at_least(
    row_ptr: tl.tensor, bound: tl.tensor, best: tl.tensor, rate: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Returns how many scores have a key of at least ``bound``, and their mass: one pass over the row."""
    count = tl.zeros([BLOCK], dtype=tl.int32)
    mass = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, VOCAB, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, cols < VOCAB, other=float("-inf"))
        kept = (cols < VOCAB) & (key_of(x) >= bound)
        count += kept.to(tl.int32)
        mass += tl.where(kept, weight_of(x, best, rate), 0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def bisect(
    row_ptr: tl.tensor,
    low: tl.tensor,  # int64 key that satisfies the condition
    high: tl.tensor,  # int64 key, at least low
    wanted: tl.tensor,  # int64
    best: tl.tensor,
    rate: tl.tensor,
    BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Returns the largest key in [low, high], int64, such that the scores from it on reach ``wanted`` mass or count."""
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count, mass = at_least(row_ptr, middle.to(tl.int32), best, rate, VOCAB, BLOCK)
        reached = mass if BY_MASS else count.to(tl.int64)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached >= wanted, high, middle - 1)
    return low


@triton.jit
def _top_k_key(
    row_ptr: tl.tensor,
    counts: tl.tensor,
    top_k: tl.tensor,
    top: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    HISTOGRAM: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Returns the key, int64, of the k-th largest score."""
    high = top.to(tl.int64)
    found = high
    missing = True
    if HISTOGRAM:
        up_to = tl.cumsum(counts, axis=0)
        found = high - tl.sum((up_to < top_k).to(tl.int32), axis=0)
        missing = tl.sum(counts, axis=0) < top_k
        high -= WINDOW
    if missing:
        low = tl.full([], -(2**31) if not HISTOGRAM else -(2**15), tl.int64)
        found = bisect(row_ptr, low, high, top_k.to(tl.int64), best, rate, False, VOCAB, BLOCK)
    return found


@triton.jit
def _top_p_key(
    row_ptr: tl.tensor,
    masses: tl.tensor,
    wanted: tl.tensor,
    low: tl.tensor,
    top: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    HISTOGRAM: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Returns the largest key, int64, from which on the mass is at least ``wanted``, and the mass above that key."""
    high = top.to(tl.int64)
    found = high
    above = wanted - wanted
    missing = True
    if HISTOGRAM:
        up_to = tl.cumsum(masses, axis=0)
        place = tl.sum((up_to < wanted).to(tl.int32), axis=0)
        found = high - place
        above = tl.sum(tl.where(tl.arange(0, WINDOW) < place, masses, 0), axis=0)
        missing = tl.sum(masses, axis=0) < wanted
        high = tl.maximum(high - WINDOW, low)
    if missing:
        found = bisect(row_ptr, low, high, wanted, best, rate, True, VOCAB, BLOCK)
        _, above = at_least(row_ptr, (found + 1).to(tl.int32), best, rate, VOCAB, BLOCK)
    return found, above


@triton.jit
def _counts_of(counts_ptr: tl.tensor, outside_ptr: tl.tensor, row: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """Returns a row's counts [WINDOW] and its mass below the window, summed over the groups."""
    counts = tl.zeros([WINDOW], dtype=tl.int32)
    outside = tl.full([], 0, tl.int64)
    for group in range(groups):
        at = row * groups + group
        counts += tl.load(counts_ptr + at * WINDOW + tl.arange(0, WINDOW))
        outside += tl.load(outside_ptr + at)
    return counts, outside


@triton.jit
def _top_p_limit(
    row_ptr: tl.tensor,
    counts: tl.tensor,
    outside: tl.tensor,
    threshold: tl.tensor,
    has_top_k: tl.tensor,
    top_p: tl.tensor,
    top: tl.tensor,
    best: tl.tensor,
    rate: tl.tensor,
    HISTOGRAM: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Returns the threshold of the smallest set, among the scores from ``threshold`` on, whose share reaches top_p.

    With it, int64 too, how many of the scores that equal the new threshold are in the set.
    """
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    masses = tl.zeros([WINDOW], dtype=tl.int64)
    if HISTOGRAM:
        keys = top - tl.arange(0, WINDOW)
        kept = (counts > 0) & (keys.to(tl.int64) >= threshold)
        weights = tl.where(kept, weight_of(tl.where(kept, value_of(keys, dtype), best), best, rate), 0)
        masses = counts.to(tl.int64) * weights
        recount = has_top_k & (top - threshold >= WINDOW)
    else:
        recount = top_p < 1.0
    total = tl.sum(masses, axis=0) + tl.where(has_top_k, 0, outside)
    if recount:
        count, total = at_least(row_ptr, threshold.to(tl.int32), best, rate, VOCAB, BLOCK)
    wanted = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
    low = tl.maximum(threshold, -(2**31) if not HISTOGRAM else -(2**15))
    found, above = _top_p_key(row_ptr, masses, wanted, low, top, best, rate, HISTOGRAM, VOCAB, BLOCK)
    weight = weight_of(value_of(found.to(tl.int32), dtype), best, rate)
    return found, (wanted - above + weight - 1) // tl.maximum(weight, 1)


@triton.jit
def _min_p_cut(best: tl.tensor, temperature: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """Returns the smallest float32 score whose weight over the largest weight is at least ``min_p``."""
    share = tl.log(tl.where(min_p > 0.0, min_p.to(tl.float64), 1.0))
    exact = tl.where(min_p > 0.0, best.to(tl.float64) + temperature.to(tl.float64) * share, float("-inf"))
    cut = exact.to(tl.float32)
    bits = cut.to(tl.int32, bitcast=True)
    next_up = tl.where(cut < 0.0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
    return tl.where(cut.to(tl.float64) < exact, next_up, cut)


@triton.jit(do_not_specialize=["groups"])
def thresholds_kernel(
    logits_ptr: tl.tensor,
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    outside_ptr: tl.tensor,
    out_ptr: tl.tensor,
    best_ptr: tl.tensor,  # [R] float32
    threshold_ptr: tl.tensor,  # [R] int32
    ties_ptr: tl.tensor,  # [R] int32
    cut_ptr: tl.tensor,  # [R] float32
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    row_stride: tl.tensor,
    groups: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Grid (R): the token of greedy and of impossible rows; of the others, what is left after the filters."""
    row = tl.program_id(0).to(tl.int64)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    best, token = merge_best(values_ptr, ids_ptr, row, CHUNKS)
    if (temperature > 0.0) & (tl.abs(best) < float("inf")):
        top_k = tl.load(top_k_ptr + slot)
        top_p = tl.load(top_p_ptr + slot).to(tl.float64)
        row_ptr = logits_ptr + row * row_stride
        rate = rate_of(temperature)
        top = key_of(best.to(logits_ptr.dtype.element_ty))
        has_top_k = (top_k > 0) & (top_k < VOCAB)
        threshold = tl.full([], NO_THRESHOLD, tl.int64)
        ties = tl.full([], ALL_TIES, tl.int64)
        counts = tl.zeros([WINDOW], dtype=tl.int32)
        outside = tl.full([], 0, tl.int64)
        if HISTOGRAM:
            if has_top_k | (top_p < 1.0):
                counts, outside = _counts_of(counts_ptr, outside_ptr, row, groups)
        if has_top_k:
            threshold = _top_k_key(row_ptr, counts, top_k, top, best, rate, HISTOGRAM, VOCAB, BLOCK)
        if top_p < 1.0:
            threshold, ties = _top_p_limit(
                row_ptr, counts, outside, threshold, has_top_k, top_p, top, best, rate, HISTOGRAM, VOCAB, BLOCK
            )
        tl.store(best_ptr + row, best)
        tl.store(threshold_ptr + row, threshold.to(tl.int32))
        tl.store(ties_ptr + row, tl.minimum(ties, ALL_TIES).to(tl.int32))
        tl.store(cut_ptr + row, _min_p_cut(best, temperature, tl.load(min_p_ptr + slot)))
    else:
        tl.store(out_ptr + row, token_or_code(best, token))
        tl.store(ties_ptr + row, DONE)
