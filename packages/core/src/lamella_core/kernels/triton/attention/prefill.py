"""Attention of packed prompt chunks over paged keys, causal: bound by multiplying.

A program owns a tile of rows of one sequence and one key/value head; a row is one query of one of the heads that share
those keys, rows of a token are next to each other. So keys are read once for the whole group, and short chunks fill a
tile. Keys that all rows see are walked over without masks.

Each sequence is given tile numbers from floor(rows before it / tile) + its index on: enough for its rows wherever they
begin, so the grid needs only the number of tokens and sequences, and the device finds a tile's sequence by counting.
Late tiles of a prompt have the most keys and go first.

Shape legend: see `common`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.attention.common import (
    LOWEST,
    UNALIGNED,
    finish,
    first_visible_tile,
    head_cache,
    key_offsets,
    layout_of,
    load_pages,
    narrow_query,
    result_like,
    scales_of,
    shape_scores,
    softmax_step,
    storage,
    widen_float8,
)
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl

_SEQUENCES_AT_ONCE = tl.constexpr(256)


@dataclass(frozen=True, slots=True)
class Tile:
    """How `_prefill_kernel` divides the work.

    Attributes:
        block_m: rows per program.
        block_n: keys per step.
        num_warps: warps per program.
        num_stages: steps whose keys are in shared memory or on their way to it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=1024)
def choose_tile(padded_dim: int, query_bytes: int, key_bytes: int, most_rows: int) -> Tile:
    """Returns the tile for chunks of at most ``most_rows`` rows (queries times heads of a group)."""
    if query_bytes == 4:
        return Tile(16, 16 if padded_dim > 128 else 32, 4, 1)
    if most_rows <= 16:
        return Tile(16, 32 if padded_dim > 128 else 64, 4, 3)
    if most_rows <= 64:
        return Tile(64, 32 if padded_dim > 128 else 64, 4, 3)
    return Tile(128, 64, 8, 2 if padded_dim > 128 else 3)


@triton.jit
def _find_sequence(starts_ptr, num_seqs, tile, G: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the sequence that a tile number belongs to; -1: to none."""
    found = -1
    for begin in range(0, num_seqs, _SEQUENCES_AT_ONCE):
        seqs = begin + tl.arange(0, _SEQUENCES_AT_ONCE)
        there = seqs < num_seqs
        first_tiles = tl.load(starts_ptr + seqs, there, other=0) * G // BLOCK_M + seqs
        found += tl.sum((there & (first_tiles <= tile)).to(tl.int32), axis=0)
    return found


@triton.jit
def _widened(x, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns keys or values in the dtype of products."""
    return widen_float8(x, L) if L.float8 else x


@triton.jit
def _attend_tiles(  # type: ignore[no-untyped-def]
    acc,  # [M, D padded]
    highest,  # [M]
    total,  # [M]
    q,  # [M, D padded]
    positions,  # [M] of the queries
    k_ptr,  # [N, P, D] of this key/value head
    v_ptr,
    table_ptr,  # [B] of this sequence
    last_page,
    begin,  # steps
    end,
    skipped,  # tiles between the sinks and the window
    sink_tiles,
    factor,
    slopes,  # [M] or None
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Advances the softmax of M rows over tiles of keys; unless MASKED each row sees each key."""
    cols = tl.arange(0, L.padded_dim)[None, :]
    in_row = cols < L.head_dim
    pages = load_pages(table_ptr, begin + tl.where(begin >= sink_tiles, skipped, 0), last_page, L, BLOCK_N)
    for step in range(begin, end):
        tile = step + tl.where(step >= sink_tiles, skipped, 0)
        next_tile = step + 1 + tl.where(step + 1 >= sink_tiles, skipped, 0)
        next_pages = load_pages(table_ptr, next_tile, last_page, L, BLOCK_N)
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        offsets = key_offsets(pages, tile, L, BLOCK_N, 1) + cols
        mask = in_row
        if MASKED:
            there = keys <= tl.max(positions, axis=0)
            mask = in_row & there[:, None]
        if MASKED or L.padded_dim != L.head_dim:
            k = tl.load(k_ptr + offsets, mask, other=0)
            v = tl.load(v_ptr + offsets, mask, other=0)
        else:
            k = tl.load(k_ptr + offsets)
            v = tl.load(v_ptr + offsets)
        distances = keys[None, :] - positions[:, None]
        scores = tl.dot(q, tl.trans(_widened(k, L)), input_precision="ieee")
        scores, rest = shape_scores(scores, factor, distances, slopes, L)
        if MASKED:
            seen = distances <= 0
            if L.window > 0:
                seen = seen & ((distances > -L.window) | (keys < L.sinks)[None, :]) & (pages >= 0)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        weights, highest, fade = softmax_step(scores, rest, highest)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(L.dtype), _widened(v, L), acc * fade[:, None], input_precision="ieee")
        pages = next_pages
    return acc, highest, total


@triton.jit
def _attend_rows(  # type: ignore[no-untyped-def]
    q,  # [M, D padded]
    positions,  # [M]
    first_position,
    last_position,
    k_ptr,  # as for _attend_tiles
    v_ptr,
    table_ptr,
    last_page,
    factor,
    slopes,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Returns the softmax of M rows over all keys they see: acc [M, D padded], maximum and sum [M]."""
    BLOCK_M: tl.constexpr = q.shape[0]
    WIDTH: tl.constexpr = q.shape[1]
    first = first_visible_tile(first_position, L, BLOCK_N)
    sink_tiles = tl.minimum((L.sinks + BLOCK_N - 1) // BLOCK_N, first)
    skipped = first - sink_tiles
    steps = last_position // BLOCK_N + 1 - skipped
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    plain = 0  # steps without masks
    if L.window == 0:
        plain = (first_position + 1) // BLOCK_N
        acc, highest, total = _attend_tiles(
            acc, highest, total, q, positions, k_ptr, v_ptr, table_ptr, last_page, 0, plain, skipped, sink_tiles,
            factor, slopes, L, BLOCK_N, False,
        )  # fmt: skip
    return _attend_tiles(
        acc, highest, total, q, positions, k_ptr, v_ptr, table_ptr, last_page, plain, steps, skipped, sink_tiles,
        factor, slopes, L, BLOCK_N, True,
    )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=["num_seqs", "table_stride", "scale"], do_not_specialize_on_alignment=UNALIGNED)
def _prefill_kernel(  # type: ignore[no-untyped-def]
    out_ptr, q_ptr,  # [T, Hq, D]
    k_ptr, v_ptr,  # [N, Hkv, P, D]
    tables_ptr,  # [*, B] int32
    rows_ptr, starts_ptr, lengths_ptr,  # [S], [S + 1], [S] int32
    alibi_ptr, sinks_ptr,  # [Hq], or None
    kv_scales_ptr, out_scale_ptr,  # [2] and [] float32, or None
    num_seqs, table_stride, scale,
    L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One tile of one sequence's rows (its queries times the heads of one key/value head)."""
    WIDTH: tl.constexpr = L.padded_dim
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    seq = _find_sequence(starts_ptr, num_seqs, tile, L.group, BLOCK_M)
    if seq < 0:
        return
    start, stop = tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1)
    first_row = (tile - seq - start * L.group // BLOCK_M) * BLOCK_M
    num_rows = (stop - start) * L.group
    if first_row >= num_rows:
        return
    length, table_row = tl.load(lengths_ptr + seq), tl.load(rows_ptr + seq).to(tl.int64)
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), num_rows - 1)  # what is beyond the last row equals it
    tokens = (start + rows // L.group).to(tl.int64)
    heads = kv_head * L.group + rows % L.group
    past = length - (stop - start)  # keys before the first query
    cols = tl.arange(0, WIDTH)[None, :]
    mask = cols < L.head_dim
    q_at = q_ptr + (tokens * L.q_token_stride + heads * L.q_head_stride)[:, None] + cols
    factor, v_scale = scales_of(kv_scales_ptr, scale)
    slopes = None if alibi_ptr is None else tl.load(alibi_ptr + heads).to(tl.float32)
    acc, highest, total = _attend_rows(
        narrow_query(tl.load(q_at, mask, other=0.0), L), past + rows // L.group,
        past + first_row // L.group, past + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // L.group,
        head_cache(k_ptr, kv_head, 1, L), head_cache(v_ptr, kv_head, 1, L), tables_ptr + table_row * table_stride,
        (length - 1) // L.page, factor, slopes, L, BLOCK_N,
    )
    sink_ptrs = None if sinks_ptr is None else sinks_ptr + heads
    out = finish(acc, highest, total, sink_ptrs, v_scale, out_scale_ptr, L)
    out_at = out_ptr + ((tokens * L.heads + heads) * L.head_dim)[:, None] + cols
    valid = first_row + tl.arange(0, BLOCK_M) < num_rows
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask & valid[:, None])
# fmt: on


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    table_rows: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    sliding_window: int = 0,
    num_sinks: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    kv_scales: Tensor | None = None,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Attention of each sequence's last tokens over its keys, causal: [T, Hq, D]. Other keywords: see `common`.

    Nothing is read back from the device.

    * q [T, Hq, D], packed: the last tokens of sequence i are rows ``query_start[i]`` to ``query_start[i + 1]``; their
      own keys are in the cache.
    * query_start [S + 1] int32, rising; rows before the first or from the last on are left as they are in ``out``.
    * context_lens [S] int32: keys of each sequence, the queries' own included.
    * max_query_len: of any sequence, or more; only speed depends on it.
    * tile: other than the one for this layer and chunk length.
    """
    layout = layout_of(q, k_cache, v_cache, scale, sliding_window, num_sinks, softcap)
    out = result_like(q, out_scale, out)
    num_seqs = table_rows.shape[0]
    if num_seqs == 0 or q.shape[0] == 0:
        return out
    most_rows = next_power_of_2(max_query_len * layout.group)
    tile = tile or choose_tile(layout.padded_dim, q.element_size(), k_cache.element_size(), most_rows)
    num_tiles = q.shape[0] * layout.group // tile.block_m + num_seqs
    _prefill_kernel[layout.heads // layout.group, num_tiles](
        storage(out), q, storage(k_cache), storage(v_cache), block_tables, table_rows, query_start, context_lens,
        alibi_slopes, sink_logits, kv_scales, out_scale, num_seqs, block_tables.stride(0), scale,
        L=layout, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, USE_PDL=use_pdl(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(),
    )  # fmt: skip
    return out
