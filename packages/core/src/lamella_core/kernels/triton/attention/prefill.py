"""Attention of packed prompt chunks over paged keys or over their own, causal: bound by multiplying.

A program owns a tile of rows of one sequence and one key/value head; a row is one query of one of the heads that share
those keys, rows of a token are next to each other. So keys are read once for the whole group, and short chunks fill a
tile. Keys that all rows see are walked over without masks.

Each sequence is given tile numbers from floor(rows before it / tile) + its index on: enough for its rows wherever they
begin, so the grid needs only the number of tokens and sequences, and the device finds a tile's sequence by counting.
Late tiles of a prompt have the most keys and go first.

Shape legend: see `common`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.sparsity import BlockSparsity
from lamella_core.kernels.triton.attention.common import (
    LOWEST,
    UNALIGNED,
    Layout,
    are_alike,
    finish,
    first_visible_tile,
    head_cache,
    in_pattern,
    key_offsets,
    layout_of,
    load_pages,
    narrow_query,
    oldest_key,
    ragged_layout_of,
    result_like,
    scales_of,
    shape_scores,
    softmax_step,
    storage,
    widen_float8,
)
from lamella_core.kernels.triton.attention.prefill_plan import Tile, choose_tile, fitting
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl

_SEQUENCES_AT_ONCE = tl.constexpr(256)


@triton.jit
def find_sequence(starts_ptr, num_seqs, tile, G: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
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
def _seen(distances, positions, keys, pages, heads, prefix, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns which keys [K] of a tile the rows [M] see: [M, K]; arguments are as in `_attend_tiles`."""
    seen = distances <= 0
    if prefix is not None:
        seen = seen | ((positions < prefix)[:, None] & (keys < prefix)[None, :])
    if L.sparse_block > 0:
        seen = seen & in_pattern(positions, heads, keys, L)
    if L.window > 0:
        seen = seen & ((keys[None, :] >= oldest_key(positions, L)[:, None]) | (keys < L.sinks)[None, :])
        if L.page > 0:
            seen = seen & (pages >= 0)[None, :]
    return seen


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
    heads,  # [M]
    prefix,  # keys that queries among them all see, or None
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
            if prefix is not None:
                there = there | (keys < prefix)
            mask = in_row & there[:, None]
        if MASKED or L.padded_dim != L.head_dim:
            k = tl.load(k_ptr + offsets, mask, other=0)
            v = tl.load(v_ptr + offsets, mask, other=0)
        else:
            k = tl.load(k_ptr + offsets)
            v = tl.load(v_ptr + offsets)
        distances = keys[None, :] - positions[:, None]
        scores = tl.dot(q, tl.trans(_widened(k, L)), input_precision="ieee")
        scores, rest = shape_scores(scores, factor, keys, distances, slopes, L)
        if MASKED:
            scores = tl.where(_seen(distances, positions, keys, pages, heads, prefix, L), scores, float("-inf"))
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
    heads,
    prefix,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Returns the softmax of M rows over all keys they see: acc [M, D padded], maximum and sum [M]."""
    BLOCK_M: tl.constexpr = q.shape[0]
    WIDTH: tl.constexpr = q.shape[1]
    first = first_visible_tile(first_position, L, BLOCK_N)
    sink_tiles = tl.minimum((L.sinks + BLOCK_N - 1) // BLOCK_N, first)
    skipped = first - sink_tiles
    last_key = last_position
    if prefix is not None:
        last_key = tl.where(first_position < prefix, tl.maximum(last_position, prefix - 1), last_position)
    steps = last_key // BLOCK_N + 1 - skipped
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    plain = 0  # steps without masks
    if L.window == 0 and L.sparse_block == 0:
        plain = (first_position + 1) // BLOCK_N
        acc, highest, total = _attend_tiles(
            acc, highest, total, q, positions, k_ptr, v_ptr, table_ptr, last_page, 0, plain, skipped, sink_tiles,
            factor, slopes, heads, prefix, L, BLOCK_N, False,
        )  # fmt: skip
    return _attend_tiles(
        acc, highest, total, q, positions, k_ptr, v_ptr, table_ptr, last_page, plain, steps, skipped, sink_tiles,
        factor, slopes, heads, prefix, L, BLOCK_N, True,
    )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=["num_seqs", "table_stride", "scale"], do_not_specialize_on_alignment=UNALIGNED)
def _prefill_kernel(  # type: ignore[no-untyped-def]
    out_ptr, q_ptr,  # [T, Hq, D]
    k_ptr, v_ptr,  # [N, Hkv, P, D], or without pages [T, Hkv, D]
    tables_ptr,  # [*, B] int32; without pages None, as are rows and lengths
    rows_ptr, starts_ptr, lengths_ptr,  # [S], [S + 1], [S] int32
    prefixes_ptr,  # [S] int32, or None
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
    seq = find_sequence(starts_ptr, num_seqs, tile, L.group, BLOCK_M)
    if seq < 0:
        return
    start, stop = tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1)
    first_row = (tile - seq - start * L.group // BLOCK_M) * BLOCK_M
    num_rows = (stop - start) * L.group
    if first_row >= num_rows:
        return
    k_ptr, v_ptr = head_cache(k_ptr, kv_head, 1, L), head_cache(v_ptr, kv_head, 1, L)
    if L.page == 0:
        past, last_page, table_ptr = start * 0, start * 0, starts_ptr  # of which nothing is read
        k_ptr += start.to(tl.int64) * L.token_stride
        v_ptr += start.to(tl.int64) * L.token_stride
    else:
        length = tl.load(lengths_ptr + seq)
        past, last_page = length - (stop - start), (length - 1) // L.page  # keys before the first query
        table_ptr = tables_ptr + tl.load(rows_ptr + seq).to(tl.int64) * table_stride
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), num_rows - 1)  # what is beyond the last row equals it
    tokens = (start + rows // L.group).to(tl.int64)
    heads = kv_head * L.group + rows % L.group
    cols = tl.arange(0, WIDTH)[None, :]
    mask = cols < L.head_dim
    q_at = q_ptr + (tokens * L.q_token_stride + heads * L.q_head_stride)[:, None] + cols
    factor, v_scale = scales_of(kv_scales_ptr, scale)
    slopes = None if alibi_ptr is None else tl.load(alibi_ptr + heads).to(tl.float32)
    prefix = None if prefixes_ptr is None else tl.load(prefixes_ptr + seq)
    acc, highest, total = _attend_rows(
        narrow_query(tl.load(q_at, mask, other=0.0), L), past + rows // L.group,
        past + first_row // L.group, past + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // L.group,
        k_ptr, v_ptr, table_ptr, last_page, factor, slopes, heads, prefix, L, BLOCK_N,
    )
    sink_ptrs = None if sinks_ptr is None else sinks_ptr + heads
    out_scale = None if out_scale_ptr is None else tl.load(out_scale_ptr)
    out = finish(acc, highest, total, sink_ptrs, v_scale, out_scale, L)
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
    max_context_len: int = 0,
    sliding_window: int = 0,
    is_chunked: bool = False,
    num_sinks: int = 0,
    softcap: float = 0.0,
    sparsity: BlockSparsity | None = None,
    prefix_lens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rounds_alibi: bool = False,
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
    * max_context_len: like it; 0: no longer than the queries.
    * prefix_lens [S] int32, at most the contexts': the first keys of a sequence, which its queries among them all see.
    * tile: other than the one for this layer and chunk length.
    """
    mask = (sliding_window, num_sinks, softcap, is_chunked, sparsity, rounds_alibi)
    layout = layout_of(q, k_cache, v_cache, scale, *mask)
    out = result_like(q, out_scale, out)
    keys = max_context_len or max_query_len
    if table_rows.shape[0]:
        tile = tile or _tile_for(layout, q, k_cache, max_query_len, keys)
        paging = (block_tables, table_rows, query_start, context_lens, prefix_lens)
        options = (alibi_slopes, sink_logits, kv_scales, out_scale)
        _launch(layout, tile, out, (q, storage(k_cache), storage(v_cache)), paging, options, scale)
    return out


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    *,
    max_query_len: int,
    scale: float,
    sliding_window: int = 0,
    is_chunked: bool = False,
    num_sinks: int = 0,
    softcap: float = 0.0,
    sparsity: BlockSparsity | None = None,
    prefix_lens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rounds_alibi: bool = False,
    sink_logits: Tensor | None = None,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Attention of whole sequences over themselves, causal: [T, Hq, D]; no cache is read. Other keywords: see `common`.

    * q [T, Hq, D], and k and v [T, Hkv, D] of its dtype, packed: sequence i is rows ``query_start[i]`` to
      ``query_start[i + 1]``.
    * query_start [S + 1] int32, rising; rows before the first or from the last on are left as they are in ``out``.
    * max_query_len: of any sequence, or more; only speed depends on it.
    * prefix_lens: as for `prefill_attention`.
    * tile: other than the one for this layer and length.
    """
    if not are_alike(k, v):  # one of them is not a part of the fused projection any more
        k, v = k.contiguous(), v.contiguous()
    mask = (sliding_window, num_sinks, softcap, is_chunked, sparsity, rounds_alibi)
    layout = ragged_layout_of(q, k, v, scale, *mask)
    out = result_like(q, out_scale, out)
    tile = tile or _tile_for(layout, q, k, max_query_len, max_query_len)
    options = (alibi_slopes, sink_logits, None, out_scale)
    _launch(layout, tile, out, (q, k, v), (None, None, query_start, None, prefix_lens), options, scale)
    return out


def _tile_for(layout: Layout, q: Tensor, k: Tensor, max_query_len: int, most_keys: int) -> Tile:
    rows, sizes = next_power_of_2(max_query_len * layout.group), (q.element_size(), k.element_size())
    tile = choose_tile(layout.padded_dim, *sizes, rows, next_power_of_2(most_keys))
    return fitting(tile, layout.padded_dim * sizes[1], layout.padded_dim * sizes[0], q.device)


def _launch(
    layout: Layout,
    tile: Tile,
    out: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],  # queries, keys and values
    # tables, their rows, query starts, lengths, prefix lengths
    paging: tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None],
    options: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],  # as the kernel takes them
    scale: float,
) -> None:
    """Launches `_prefill_kernel` for S >= 0 sequences."""
    num_seqs, num_tokens = paging[2].shape[0] - 1, out.shape[0]
    if num_seqs <= 0 or num_tokens == 0:
        return
    num_tiles = num_tokens * layout.group // tile.block_m + num_seqs
    _prefill_kernel[layout.heads // layout.group, num_tiles](
        storage(out), *inputs, *paging, *options, num_seqs, 0 if paging[0] is None else paging[0].stride(0), scale,
        L=layout, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, USE_PDL=use_pdl(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(),
    )  # fmt: skip
