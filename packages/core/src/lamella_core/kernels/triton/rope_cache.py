"""Rotary position embedding and the write to the paged cache, in one pass over a step's queries, keys and values.

A program owns up to HEADS heads of one token: either of its queries, rotated in place, or of its keys and values,
which go to the cache. Rotated keys are not written back unless asked for: attention reads them from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float8_e4m3fn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.launch import (
    float8_storage,
    has_float8,
    launch_options,
    next_power_of_2,
    use_pdl,
)
from lamella_core.kernels.triton.quantize import to_scaled_float8

HEADS_PER_PROGRAM = 8
VALUES_PER_WARP = 512  # 16 a thread: with half-split pairs one 16-byte load of each half


@triton.jit
def store_scaled(
    ptr: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    FLOAT8: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
) -> None:
    """Stores a tile, divided by scale and as float8 if FLOAT8."""
    if FLOAT8:
        value = to_scaled_float8(value.to(tl.float32), scale, NATIVE_FLOAT8)
    tl.store(ptr, value, mask)


@triton.jit
def rotate_pairs(a: tl.tensor, b: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Rotates pairs (a, b); float32 inside, rounded once."""
    wide_a = a.to(tl.float32)
    wide_b = b.to(tl.float32)
    first = (wide_a * cos - wide_b * sin).to(a.dtype)
    second = (wide_b * cos + wide_a * sin).to(a.dtype)
    return first, second


@triton.jit
def _rotate(
    from_ptr: tl.tensor,
    to_ptr: tl.tensor,
    mask: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    token: tl.tensor,
    scale: tl.tensor,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
) -> None:
    """Stores the rotated first 2 * HALF values of heads at from_ptr [HEADS, 1] to to_ptr; rounded before the scale."""
    BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
    pair = tl.arange(0, BLOCK)[None, :]
    flat = tl.arange(0, 2 * BLOCK)[None, :]
    in_pair = mask & (pair < HALF)
    in_flat = mask & (flat < 2 * HALF)
    cos = tl.load(cos_ptr + token * HALF + pair, pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + pair, pair < HALF, other=0.0)
    if INTERLEAVED:
        x = tl.load(from_ptr + flat, in_flat, other=0.0)
        a, b = tl.split(tl.reshape(x, (HEADS, BLOCK, 2)))
    else:
        a = tl.load(from_ptr + pair, in_pair, other=0.0)
        b = tl.load(from_ptr + HALF + pair, in_pair, other=0.0)
    first, second = rotate_pairs(a, b, cos, sin)
    if INTERLEAVED:
        both = tl.reshape(tl.join(first, second), (HEADS, 2 * BLOCK))
        store_scaled(to_ptr + flat, both, in_flat, scale, FLOAT8, NATIVE_FLOAT8)
    else:
        store_scaled(to_ptr + pair, first, in_pair, scale, FLOAT8, NATIVE_FLOAT8)
        store_scaled(to_ptr + HALF + pair, second, in_pair, scale, FLOAT8, NATIVE_FLOAT8)


@triton.jit
def _rotate_keys(
    from_ptr: tl.tensor,
    to_ptr: tl.tensor,
    mask: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    token: tl.tensor,
    scale: tl.tensor,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    IN_PLACE: tl.constexpr,
) -> None:
    """`_rotate` from the step's keys into the cache; IN_PLACE: where they are too, neither scaled nor as float8."""
    if HALF > 0:
        _rotate(from_ptr, to_ptr, mask, cos_ptr, sin_ptr, token, scale, HALF, HEADS, INTERLEAVED, FLOAT8, NATIVE_FLOAT8)
        if IN_PLACE:
            tl.debug_barrier()  # other threads may still read what is now overwritten
            _rotate(
                from_ptr, from_ptr, mask, cos_ptr, sin_ptr, token, 1.0, HALF, HEADS, INTERLEAVED, False, NATIVE_FLOAT8
            )


@triton.jit
def _copy(
    from_ptr: tl.tensor,
    to_ptr: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
) -> None:
    """Copies the values FIRST <= i < END of heads at from_ptr [HEADS, 1]."""
    if FIRST < END:
        cols = tl.arange(0, triton.next_power_of_2(END))[None, :]
        inside = mask & (cols >= FIRST) & (cols < END)
        store_scaled(to_ptr + cols, tl.load(from_ptr + cols, inside, other=0.0), inside, scale, FLOAT8, NATIVE_FLOAT8)


@triton.jit
def _rope_cache_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    kv_scales_ptr: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    cache_stride: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FLOAT8: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    ROTATE_KEYS: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Grid (T, Q_GROUPS + groups of key heads); ROTARY values of a head are rotated, 0: queries are left alone."""
    HALF: tl.constexpr = ROTARY // 2
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    heads = tl.arange(0, HEADS)[:, None]
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    if group < Q_GROUPS:
        heads += group * HEADS
        base, mask = q_ptr + token * q_stride + heads * Q_HEAD_STRIDE, heads < Q_HEADS
        if ROTARY > 0:
            _rotate(base, base, mask, cos_ptr, sin_ptr, token, 1.0, HALF, HEADS, INTERLEAVED, False, NATIVE_FLOAT8)
    else:
        heads, slot = heads + (group - Q_GROUPS) * HEADS, tl.load(slots_ptr + token)
        mask = (heads < KV_HEADS) & (slot >= 0)
        k_scale = tl.load(kv_scales_ptr) if HAS_SCALES else 1.0
        v_scale = tl.load(kv_scales_ptr + 1) if HAS_SCALES else 1.0
        place = (slot // TOKENS_PER_BLOCK) * cache_stride + (slot % TOKENS_PER_BLOCK) * HEAD_DIM
        place = place + heads * (TOKENS_PER_BLOCK * HEAD_DIM)
        base = k_ptr + token * k_stride + heads * K_HEAD_STRIDE
        _rotate_keys(
            base, k_cache_ptr + place, mask, cos_ptr, sin_ptr, token, k_scale,
            HALF, HEADS, INTERLEAVED, FLOAT8, NATIVE_FLOAT8, ROTATE_KEYS,
        )  # fmt: skip
        _copy(base, k_cache_ptr + place, mask, k_scale, ROTARY, HEAD_DIM, FLOAT8, NATIVE_FLOAT8)
        base = v_ptr + token * v_stride + heads * V_HEAD_STRIDE
        _copy(base, v_cache_ptr + place, mask, v_scale, 0, VALUE_DIM, FLOAT8, NATIVE_FLOAT8)


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    kv_scales: Tensor | None = None,
    rotate_keys: bool = False,
) -> None:
    """Rotates queries in place and writes rotated keys, and values, to the cache.

    Args:
        q: [T, Hq, D], values of a head side by side, as in a view of the fused projection. So are k and v.
        k: [T, Hkv, D].
        v: [T, Hkv, D]; None: nothing is written to ``v_cache``.
        cos: [T, rotary_dim / 2] float32, contiguous; None: nothing is rotated.
        sin: like cos.
        rotary_dim: how many values of a head are rotated; even. 0 without cos.
        interleaved: pairs are (x[2i], x[2i+1]); otherwise (x[i], x[i + rotary_dim/2]).
        k_cache: [N, Hkv, tokens per block, D], each block contiguous; the model's dtype or float8_e4m3fn.
        v_cache: like k_cache.
        slots: [T] int64, block * tokens per block + offset; negative ones are not written.
        kv_scales: [2] float32: keys and values in a float8 cache are divided by them. None: by 1.
        rotate_keys: rotate keys in place, too (those with a slot); otherwise ``k`` is left as it is.
    """
    num_tokens, q_heads, head_dim = q.shape
    if num_tokens == 0:
        return
    kv_heads, tokens_per_block = k_cache.shape[1], k_cache.shape[2]
    rotary = 0 if cos is None else rotary_dim
    heads = min(HEADS_PER_PROGRAM, next_power_of_2(max(q_heads, kv_heads)))
    q_groups = -(-q_heads // heads) if rotary else 0
    float8 = k_cache.dtype is float8_e4m3fn
    value_dim, v = (0, k) if v is None else (head_dim, v)
    _rope_cache_kernel[(num_tokens, q_groups + -(-kv_heads // heads))](
        q, k, v,
        slots if cos is None else cos,  # any pointer
        slots if sin is None else sin,
        float8_storage(k_cache) if float8 else k_cache,
        float8_storage(v_cache) if float8 else v_cache,
        slots, kv_scales, q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0),
        Q_HEADS=q_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        Q_HEAD_STRIDE=q.stride(1), K_HEAD_STRIDE=k.stride(1), V_HEAD_STRIDE=v.stride(1),
        TOKENS_PER_BLOCK=tokens_per_block, ROTARY=rotary, Q_GROUPS=q_groups, HEADS=heads, INTERLEAVED=interleaved,
        FLOAT8=float8, HAS_SCALES=float8 and kv_scales is not None, NATIVE_FLOAT8=has_float8(),
        ROTATE_KEYS=rotate_keys, USE_PDL=use_pdl(),
        num_warps=min(8, max(1, heads * next_power_of_2(head_dim) // VALUES_PER_WARP)), **launch_options(),
    )  # fmt: skip
