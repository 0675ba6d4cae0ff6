"""What the kernels of few rows' products do with their sums: scales, bias, then the gate, or rotation and the cache.

Numbers that the end needs are loaded before the weights are read: at the end each load would be waited for. Those that
no kernel writes are loaded before the kernel before has ended.

Shape legend: as in `lamella_core.kernels.triton.gemv`; a program has the outputs first + row, [BLOCK_N].
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from lamella_core.kernels.triton.activation import gated_silu
from lamella_core.kernels.triton.quantize import to_scaled_float8
from lamella_core.kernels.triton.rope_cache import rotate_pairs, store_scaled


class Heads(NamedTuple):
    """A product's columns as heads of queries, keys and values, and the cache; a constant of the kernels."""

    num_queries: int
    num_keys: int
    dim: int
    rotary: int  # numbers of a head that rotate
    interleaved: bool
    tokens_per_block: int
    float8: bool  # the cache is


@triton.jit
def pair_place(pair, second, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns where in its head the first or second number of a pair is: those that rotate together, then the rest."""
    if HEADS.interleaved:
        place = 2 * pair + second
    else:
        HALF: tl.constexpr = HEADS.rotary // 2
        turns = pair < HALF
        place = tl.where(turns, pair, pair + HALF) + second * tl.where(turns, HALF, HEADS.dim // 2 - HALF)
    return place


@triton.jit
def weight_rows(block, n, BLOCK_N: tl.constexpr, GATED: tl.constexpr, HEADS: tl.constexpr = None):  # type: ignore[no-untyped-def]
    """Returns the first weight row of a block, the block's rows relative to it, and which of them exist.

    GATED: n rows are [gate, up], and a block alternates rows of both halves. HEADS: a block lies in one head, whose
    first row is returned, and alternates the rows of its pairs, see `pair_place`.
    """
    row = tl.arange(0, BLOCK_N)
    if HEADS is not None:
        first = block * BLOCK_N // HEADS.dim * HEADS.dim
        row = pair_place((block * BLOCK_N - first) // 2 + row // 2, row % 2, HEADS)
        inside = first + row < n
    elif GATED:
        half = n // 2
        first = block * (BLOCK_N // 2)
        inside = first + row // 2 < half
        row = (row // 2).to(tl.int64) + (row % 2).to(tl.int64) * half
    else:
        first = block * BLOCK_N
        inside = first + row < n
    return first, row, inside


@triton.jit
def load_constants(  # type: ignore[no-untyped-def]
    first, row, inside, bias_ptr, w_scale_ptr, out_scale_ptr, kv_scales_ptr,
    SCALED: tl.constexpr, SCALE_PER_COL: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Returns what no kernel writes: bias [BLOCK_N], weight scale [] or [BLOCK_N], scale of what is stored; or 0, 1, 1.

    With HEADS the last one is that of the keys or values that a block has.
    """
    bias = 0.0
    w_scale = 1.0
    out_scale = 1.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first + row, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        if SCALE_PER_COL:
            w_scale = tl.load(w_scale_ptr + first + row, mask=inside, other=0.0)
        else:
            w_scale = tl.load(w_scale_ptr)
    if out_scale_ptr is not None:
        out_scale = tl.load(out_scale_ptr).to(tl.float32)
    if kv_scales_ptr is not None:
        is_value = first >= (HEADS.num_queries + HEADS.num_keys) * HEADS.dim
        out_scale = tl.load(kv_scales_ptr + is_value.to(tl.int32))
    return bias, w_scale, out_scale


@triton.jit
def load_inputs(  # type: ignore[no-untyped-def]
    block, x_scale_ptr, cos_ptr, sin_ptr, slots_ptr, m, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr, SCALE_PER_ROW: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Returns what kernels before may have written: scale of x, [] or [ROWS]; cos and sin; slots [ROWS, 1].

    cos and sin are of a block's pairs, [ROWS, BLOCK_N / 2], 0 where none turns.
    """
    row = tl.arange(0, ROWS)
    x_scale = 1.0
    cos = 0.0
    sin = 0.0
    slot = -1
    if SCALED:
        if SCALE_PER_ROW:
            x_scale = tl.load(x_scale_ptr + row, mask=row < m, other=0.0)
        else:
            x_scale = tl.load(x_scale_ptr)
    if HEADS is not None:
        row = row[:, None]
        slot = tl.load(slots_ptr + row, mask=row < m, other=-1)
        HALF: tl.constexpr = HEADS.rotary // 2
        if HALF > 0:
            pair = (block * BLOCK_N % HEADS.dim) // 2 + tl.arange(0, BLOCK_N // 2)[None, :]
            there = (row < m) & (pair < HALF)
            cos = tl.load(cos_ptr + row * HALF + pair, mask=there, other=0.0)
            sin = tl.load(sin_ptr + row * HALF + pair, mask=there, other=0.0)
    return x_scale, cos, sin, slot


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    acc,  # [ROWS, BLOCK_N] float32, of the weight rows that `weight_rows` gave with `first`
    block, first, constants, inputs, out_ptr, k_cache_ptr, v_cache_ptr, cache_stride, m, n,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, HEADS: tl.constexpr,
    GATED: tl.constexpr, QUANTIZE: tl.constexpr, NATIVE_FLOAT8: tl.constexpr,
):  # fmt: skip
    """Scales sums, adds the bias, and stores them, or what the gate makes of them, or heads."""
    bias, w_scale, out_scale = constants
    x_scale, cos, sin, slot = inputs
    if SCALED:
        acc *= _along(w_scale, 0)
        acc *= _along(x_scale, 1)
    if HAS_BIAS:
        acc += bias[None, :]
    result = acc.to(DTYPE)
    if HEADS is not None:
        _store_heads(
            result, block, cos, sin, slot, out_ptr, k_cache_ptr, v_cache_ptr, out_scale, cache_stride, m,
            HEADS, NATIVE_FLOAT8,
        )  # fmt: skip
    elif GATED:
        _store_gated(result, first, out_ptr, out_scale, m, n, QUANTIZE, NATIVE_FLOAT8)
    else:
        _store_product(result, first, out_ptr, m, n)


@triton.jit
def _along(scale, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a vector with a dimension more; a number as it is."""
    if len(scale.shape) == 1:
        scale = tl.expand_dims(scale, axis)
    return scale


@triton.jit
def _store_product(result, first, out_ptr, m, n):  # type: ignore[no-untyped-def]
    """Stores a block of the product [M, N]."""
    rows = tl.arange(0, result.shape[0]).to(tl.int64)[:, None]
    cols = (first + tl.arange(0, result.shape[1]))[None, :]
    tl.store(out_ptr + rows * n + cols, result, mask=(rows < m) & (cols < n))


@triton.jit
def _store_gated(  # type: ignore[no-untyped-def]
    result, first, out_ptr, out_scale, m, n, QUANTIZE: tl.constexpr, NATIVE_FLOAT8: tl.constexpr
):
    """Stores what the gate makes of a block that alternates gate and up: [M, N / 2]."""
    gate, up = tl.split(tl.reshape(result, (result.shape[0], result.shape[1] // 2, 2)))
    gated = gated_silu(gate, up)
    if QUANTIZE:
        gated = to_scaled_float8(gated.to(tl.float32), out_scale, NATIVE_FLOAT8)
    _store_product(gated, first, out_ptr, m, n // 2)


@triton.jit
def _store_heads(  # type: ignore[no-untyped-def]
    result, block, cos, sin, slot, q_ptr, k_cache_ptr, v_cache_ptr, kv_scale, cache_stride, m,
    HEADS: tl.constexpr, NATIVE_FLOAT8: tl.constexpr,
):  # fmt: skip
    """Stores a block of queries, rotated, or of rotated keys or values in the cache."""
    BLOCK_N: tl.constexpr = result.shape[1]
    P: tl.constexpr = HEADS.tokens_per_block
    a, b = tl.split(tl.reshape(result, (result.shape[0], BLOCK_N // 2, 2)))
    head = block * BLOCK_N // HEADS.dim
    is_value = head >= HEADS.num_queries + HEADS.num_keys
    pair = (block * BLOCK_N % HEADS.dim) // 2 + tl.arange(0, BLOCK_N // 2)[None, :]
    if HEADS.rotary > 0:
        turns = (pair < HEADS.rotary // 2) & (is_value == 0)
        turned_a, turned_b = rotate_pairs(a, b, cos, sin)
        a = tl.where(turns, turned_a, a)
        b = tl.where(turns, turned_b, b)
    at_a = pair_place(pair, 0, HEADS)
    at_b = pair_place(pair, 1, HEADS)
    if head < HEADS.num_queries:
        row = tl.arange(0, result.shape[0]).to(tl.int64)[:, None]
        base = q_ptr + row * (HEADS.num_queries * HEADS.dim) + head * HEADS.dim
        inside = (row < m) & (pair >= 0)
        tl.store(base + at_a, a, inside)
        tl.store(base + at_b, b, inside)
    else:
        kv_head = head - HEADS.num_queries - tl.where(is_value, HEADS.num_keys, 0)
        place = (slot // P) * cache_stride + (slot % P) * HEADS.dim + kv_head * (P * HEADS.dim)
        inside = (slot >= 0) & (pair >= 0)
        if is_value:
            store_scaled(v_cache_ptr + place + at_a, a, inside, kv_scale, HEADS.float8, NATIVE_FLOAT8)
            store_scaled(v_cache_ptr + place + at_b, b, inside, kv_scale, HEADS.float8, NATIVE_FLOAT8)
        else:
            store_scaled(k_cache_ptr + place + at_a, a, inside, kv_scale, HEADS.float8, NATIVE_FLOAT8)
            store_scaled(k_cache_ptr + place + at_b, b, inside, kv_scale, HEADS.float8, NATIVE_FLOAT8)
