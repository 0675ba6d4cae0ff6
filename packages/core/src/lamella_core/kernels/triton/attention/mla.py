"""Attention over a latent cache (MLA, DeepSeek-V2, 2024): all heads share one key, whose last numbers are its value.

A program owns a tile of rows of one sequence; a row is one query of one head, rows of a token are next to each other.
Each key is read once for all rows and used twice, for scores and as value. One kernel serves prompt chunks and
decoding. Decoding divides long contexts among programs, and a second kernel joins the parts; how many a sequence has
follows on the device from its length, so that a captured launch serves all lengths.

Shape legend: see `common`; Hkv is 1. D = R + V: a key is R rotated numbers, then the V of its value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.errors import ConfigError
from lamella_core.kernels.triton.attention.common import (
    FLOAT8,
    LOWEST,
    UNALIGNED,
    Layout,
    finish,
    first_visible_tile,
    head_cache,
    key_offsets,
    layout_of,
    load_pages,
    narrow_query,
    num_processors,
    shape_scores,
    softmax_step,
    storage,
    widen_float8,
)
from lamella_core.kernels.triton.attention.mla_plan import (
    LEAST_PART,
    MOST_ROWS,
    WORTH_SPLITTING,
    Tile,
    Workspace,
    choose_parts,
    choose_tile,
    latent_workspace,
    padded,
)
from lamella_core.kernels.triton.attention.prefill import find_sequence
from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl

WORTH = tl.constexpr(WORTH_SPLITTING)
_JOIN_WARPS = 4


@triton.jit
def _attend_keys(  # type: ignore[no-untyped-def]
    q_rotated,  # [M, R padded]
    q_latent,  # [M, V padded]
    positions,  # [M] of the queries
    last_position,
    k_ptr,  # [N, P, D]
    table_ptr,  # [B] of this sequence
    last_page,
    begin,  # steps
    end,
    skipped,  # tiles between the sinks and the window
    sink_tiles,
    factor,
    L: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Returns the softmax of M rows over some tiles of keys: acc [M, V padded], maximum and sum [M]."""
    BLOCK_M: tl.constexpr = q_latent.shape[0]
    ROTATED: tl.constexpr = L.head_dim - VALUE_DIM
    rotated_cols = tl.arange(0, q_rotated.shape[1])[None, :]
    cols = tl.arange(0, q_latent.shape[1])[None, :]
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, q_latent.shape[1]], tl.float32)
    pages = load_pages(table_ptr, begin + tl.where(begin >= sink_tiles, skipped, 0), last_page, L, BLOCK_N)
    for step in range(begin, end):
        tile = step + tl.where(step >= sink_tiles, skipped, 0)
        next_tile = step + 1 + tl.where(step + 1 >= sink_tiles, skipped, 0)
        next_pages = load_pages(table_ptr, next_tile, last_page, L, BLOCK_N)
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        at = k_ptr + key_offsets(pages, tile, L, BLOCK_N, 1)
        there = (keys <= last_position)[:, None]
        rotated = tl.load(at + rotated_cols, there & (rotated_cols < ROTATED), other=0)
        latent = tl.load(at + ROTATED + cols, there & (cols < VALUE_DIM), other=0)
        if L.float8:
            rotated, latent = widen_float8(rotated, L), widen_float8(latent, L)
        scores = tl.dot(q_rotated, tl.trans(rotated), input_precision="ieee")
        scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")
        distances = keys[None, :] - positions[:, None]
        scores, rest = shape_scores(scores, factor, keys, distances, None, L)
        seen = distances <= 0
        if L.window > 0:
            seen = seen & ((distances > -L.window) | (keys < L.sinks)[None, :])
            seen = seen & (pages >= 0)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        weights, highest, fade = softmax_step(scores, rest, highest)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(L.dtype), latent, acc * fade[:, None], input_precision="ieee")
        pages = next_pages
    return acc, highest, total


@triton.jit
def _steps_of(first_position, last_position, L: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the steps over the keys that queries at these positions see, tiles of sinks, and tiles between."""
    first = first_visible_tile(first_position, L, BLOCK_N)
    sink_tiles = tl.minimum((L.sinks + BLOCK_N - 1) // BLOCK_N, first)
    return last_position // BLOCK_N + 1 - first + sink_tiles, sink_tiles, first - sink_tiles


@triton.jit
def _steps_of_part(steps, parts, least_steps):  # type: ignore[no-untyped-def]
    """Returns how many steps each part of a sequence has. Short sequences stay whole: joining would take longer."""
    per_part = tl.maximum((steps + parts - 1) // parts, least_steps)
    return tl.where(steps < WORTH * least_steps, tl.maximum(steps, 1), per_part)


@triton.jit
def _find_rows(starts_ptr, num_seqs, tile, L: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a tile's sequence (-1: none), its first token, its rows, and of these the tile's first."""
    if starts_ptr is None:  # one query per sequence
        CHUNKS: tl.constexpr = (L.group + BLOCK_M - 1) // BLOCK_M
        seq = tile // CHUNKS
        start, num_rows, first_row = seq, seq * 0 + L.group, tile % CHUNKS * BLOCK_M
    else:
        seq = find_sequence(starts_ptr, num_seqs, tile, L.group, BLOCK_M)
        start = tl.load(starts_ptr + tl.maximum(seq, 0))
        num_rows = (tl.load(starts_ptr + tl.maximum(seq, 0) + 1) - start) * L.group
        first_row = (tile - seq - start * L.group // BLOCK_M) * BLOCK_M
        seq = tl.where(first_row >= num_rows, -1, seq)
    return seq, start, num_rows, first_row


@triton.jit
def _park(  # type: ignore[no-untyped-def]
    acc,  # [M, V padded]
    highest,  # [M]
    total,  # [M]
    place,  # of this part among those of all tiles
    partial_ptr,
    stats_ptr,
):
    """Stores a part's softmax for `_join_kernel`."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, acc.shape[1])
    tl.store(partial_ptr + (place * BLOCK_M + rows)[:, None] * acc.shape[1] + cols[None, :], acc)
    tl.store(stats_ptr + place * (2 * BLOCK_M) + rows, highest)
    tl.store(stats_ptr + place * (2 * BLOCK_M) + BLOCK_M + rows, total)


# fmt: off
@triton.jit(
    do_not_specialize=["num_seqs", "table_stride", "scale", "parts", "least_steps"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _latent_kernel(  # type: ignore[no-untyped-def]
    out_ptr, q_ptr,  # [T, Hq, V], [T, Hq, D]
    k_ptr,  # [N, 1, P, D]
    tables_ptr,  # [*, B] int32
    rows_ptr, starts_ptr, lengths_ptr,  # [S], [S + 1], [S] int32; without starts each sequence has one query
    kv_scales_ptr,  # [1] float32, or None
    partial_ptr, stats_ptr,  # see `Workspace`; None: no sequence is split
    num_seqs, table_stride, scale, parts,
    least_steps,  # of a part
    L: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROTATED_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One part of the keys of one tile of one sequence's rows."""
    ROTATED: tl.constexpr = L.head_dim - VALUE_DIM
    part, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    seq, start, num_rows, first_row = _find_rows(starts_ptr, num_seqs, tile, L, BLOCK_M)
    if seq < 0:
        return
    length = tl.load(lengths_ptr + seq)
    past = length - num_rows // L.group  # keys before the first query
    last_position = past + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // L.group
    steps, sink_tiles, skipped = _steps_of(past + first_row // L.group, last_position, L, BLOCK_N)
    per_part = _steps_of_part(steps, parts, least_steps)
    if part * per_part >= tl.maximum(steps, 1):
        return
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), num_rows - 1)  # what is beyond the last row equals it
    tokens, heads = (start + rows // L.group).to(tl.int64), rows % L.group
    q_at = q_ptr + (tokens * L.q_token_stride + heads * L.q_head_stride)[:, None]
    rotated_cols, cols = tl.arange(0, ROTATED_WIDTH)[None, :], tl.arange(0, WIDTH)[None, :]
    k_scale = 1.0 if kv_scales_ptr is None else tl.load(kv_scales_ptr)
    acc, highest, total = _attend_keys(
        narrow_query(tl.load(q_at + rotated_cols, rotated_cols < ROTATED, other=0.0), L),
        narrow_query(tl.load(q_at + ROTATED + cols, cols < VALUE_DIM, other=0.0), L),
        past + rows // L.group, last_position, head_cache(k_ptr, 0, 1, L),
        tables_ptr + tl.load(rows_ptr + seq).to(tl.int64) * table_stride, tl.maximum(length - 1, 0) // L.page,
        part * per_part, tl.minimum((part + 1) * per_part, steps), skipped, sink_tiles, scale * k_scale,
        L, VALUE_DIM, BLOCK_N,
    )
    is_whole = per_part >= steps
    if partial_ptr is not None:
        if not is_whole:
            _park(acc, highest, total, tile.to(tl.int64) * parts + part, partial_ptr, stats_ptr)
    out = finish(acc, highest, total, None, k_scale, None, L)
    out_at = out_ptr + ((tokens * L.heads + heads) * VALUE_DIM)[:, None] + cols
    valid = (first_row + tl.arange(0, BLOCK_M) < num_rows) & is_whole
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), valid[:, None] & (cols < VALUE_DIM))


@triton.jit(do_not_specialize=["parts", "least_steps"], do_not_specialize_on_alignment=UNALIGNED)
def _join_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [S, Hq, V]
    lengths_ptr,  # [S] int32
    kv_scales_ptr,
    partial_ptr, stats_ptr,
    parts, least_steps,  # as given to `_latent_kernel`
    L: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,  # at least as many as there are
    USE_PDL: tl.constexpr,
):
    """Joins the parts of one head of one sequence, if it has more than one."""
    CHUNKS: tl.constexpr = (L.group + BLOCK_M - 1) // BLOCK_M
    head, seq = tl.program_id(0), tl.program_id(1)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    last = tl.load(lengths_ptr + seq) - 1
    steps, _sink_tiles, _skipped = _steps_of(last, last, L, BLOCK_N)
    per_part = _steps_of_part(steps, parts, least_steps)
    if per_part >= steps:
        return
    used = (steps + per_part - 1) // per_part
    first = (seq * CHUNKS + head // BLOCK_M).to(tl.int64) * parts
    row, all_parts, cols = head % BLOCK_M, tl.arange(0, PARTS), tl.arange(0, WIDTH)
    stats_at = stats_ptr + (first + all_parts) * (2 * BLOCK_M) + row
    maxima = tl.load(stats_at, all_parts < used, other=LOWEST)
    sums = tl.load(stats_at + BLOCK_M, all_parts < used, other=0.0)
    highest = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp2(maxima - highest), axis=0)
    acc = tl.zeros([WIDTH], tl.float32)
    for part in range(0, used):
        share = tl.exp2(tl.load(stats_ptr + (first + part) * (2 * BLOCK_M) + row) - highest)
        acc += tl.load(partial_ptr + ((first + part) * BLOCK_M + row) * WIDTH + cols) * share
    k_scale = 1.0 if kv_scales_ptr is None else tl.load(kv_scales_ptr)
    out = acc * (k_scale / tl.where(total == 0.0, 1.0, total))
    out_at = out_ptr + (seq.to(tl.int64) * L.heads + head) * VALUE_DIM + cols
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), cols < VALUE_DIM)
# fmt: on


def latent_decode(
    q: Tensor,
    k_cache: Tensor,
    value_dim: int,
    block_tables: Tensor,
    table_rows: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    max_context_len: int,
    sliding_window: int = 0,
    num_sinks: int = 0,
    kv_scales: Tensor | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
    parts: int | None = None,
) -> Tensor:
    """Attention of one query per sequence over all its keys: [S, Hq, V]. Other arguments: see `common`.

    Nothing is read back; a captured launch serves other lengths up to ``max_context_len``, tables and rows.

    * q [S, Hq, D]: the query's own key is in the cache.
    * value_dim: V.
    * context_lens [S] int32: keys of each sequence; where 0 the result is zero.
    * max_context_len: upper bound of ``context_lens``; only speed depends on it.
    * kv_scales: the first is what cached keys are multiplied by.
    * workspace: see `latent_workspace`; made for this call if it is needed and missing.
    * parts: other than what `choose_parts` says for this batch; needs a workspace large enough.
    """
    layout, out = _checked(q, k_cache, value_dim, scale, sliding_window, num_sinks, out)
    num_seqs = q.shape[0]
    if num_seqs == 0:
        return out
    tile = _tile_for(layout, q, k_cache, layout.group)
    num_tiles = num_seqs * -(-layout.group // tile.block_m)
    parts = parts or choose_parts(num_tiles, max_context_len, num_processors(q.device))
    space = _space(workspace, num_tiles * parts, tile, layout, value_dim, q.device) if parts > 1 else (None, None)
    paging = (block_tables, table_rows, None, context_lens)
    _launch(layout, tile, out, (q, k_cache), paging, kv_scales, value_dim, scale, (parts, num_tiles), space)
    if parts > 1:
        _join_kernel[layout.group, num_seqs](
            out, context_lens, kv_scales, *space, parts, -(-LEAST_PART // tile.block_n), L=layout, VALUE_DIM=value_dim,
            WIDTH=padded(value_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, PARTS=next_power_of_2(parts),
            USE_PDL=use_pdl(), num_warps=_JOIN_WARPS, **launch_options(),
        )  # fmt: skip
    return out


def latent_prefill(
    q: Tensor,
    k_cache: Tensor,
    value_dim: int,
    block_tables: Tensor,
    table_rows: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    sliding_window: int = 0,
    num_sinks: int = 0,
    kv_scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's last tokens over its keys, causal: [T, Hq, V]. Other arguments: see `common`.

    * q [T, Hq, D], packed: the last tokens of sequence i are rows ``query_start[i]`` to ``query_start[i + 1]``; their
      own keys are in the cache.
    * value_dim: V.
    * query_start [S + 1] int32, rising; rows before the first or from the last on are left as they are in ``out``.
    * context_lens [S] int32: keys of each sequence, the queries' own included.
    * max_query_len: of any sequence, or more; only speed depends on it.
    * kv_scales: the first is what cached keys are multiplied by.
    """
    layout, out = _checked(q, k_cache, value_dim, scale, sliding_window, num_sinks, out)
    num_seqs = query_start.shape[0] - 1
    if num_seqs <= 0 or q.shape[0] == 0:
        return out
    tile = _tile_for(layout, q, k_cache, layout.group * max_query_len)
    num_tiles = q.shape[0] * layout.group // tile.block_m + num_seqs
    paging = (block_tables, table_rows, query_start, context_lens)
    _launch(layout, tile, out, (q, k_cache), paging, kv_scales, value_dim, scale, (1, num_tiles), (None, None))
    return out


def _tile_for(layout: Layout, q: Tensor, k_cache: Tensor, most_rows: int) -> Tile:
    rows = next_power_of_2(most_rows)
    return choose_tile(layout.head_dim, q.element_size(), k_cache.element_size(), min(rows, MOST_ROWS), q.device)


def _checked(
    q: Tensor,
    k_cache: Tensor,
    value_dim: int,
    scale: float,
    sliding_window: int,
    num_sinks: int,
    out: Tensor | None,
) -> tuple[Layout, Tensor]:
    """Returns what the kernels are compiled for, and where the result goes.

    Raises:
        ConfigError: tensors do not fit each other or the kernels.
    """
    layout = layout_of(q, k_cache, k_cache, scale, sliding_window, num_sinks, 0.0)
    if layout.group != layout.heads or not 0 < value_dim < layout.head_dim:
        raise ConfigError(
            f"a latent cache {list(k_cache.shape)} [N, Hkv, P, D] with values of {value_dim}: it needs one head, and "
            "values narrower than D"
        )
    shape = (*q.shape[:2], value_dim)
    if out is None:
        return layout, torch.empty(shape, dtype=q.dtype, device=q.device)
    if out.dtype != q.dtype or out.shape != shape or not out.is_contiguous():
        raise ConfigError(f"out is {out.dtype} {list(out.shape)}; it must be contiguous {q.dtype} {list(shape)}")
    return layout, out


def _space(
    workspace: Workspace | None, programs: int, tile: Tile, layout: Layout, value_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the tensors of a workspace in which so many parts have room."""
    space = workspace or latent_workspace(layout.heads, value_dim, device)
    if programs * tile.block_m * padded(value_dim) > space.partial.numel():
        raise ConfigError(f"the workspace is too small for {programs} parts; make it by latent_workspace, or larger")
    return space.partial, space.stats


def _launch(
    layout: Layout,
    tile: Tile,
    out: Tensor,
    inputs: tuple[Tensor, Tensor],  # queries, cache
    paging: tuple[Tensor, Tensor, Tensor | None, Tensor],  # tables, their rows, query starts, lengths
    kv_scales: Tensor | None,
    value_dim: int,
    scale: float,
    grid: tuple[int, int],  # parts, tiles
    space: tuple[Tensor | None, Tensor | None],
) -> None:
    q, k_cache = inputs
    _latent_kernel[grid](
        out, q, storage(k_cache), *paging, kv_scales if k_cache.dtype == FLOAT8 else None, *space,
        paging[1].shape[0], paging[0].stride(0), scale, grid[0], -(-LEAST_PART // tile.block_n),
        L=layout, VALUE_DIM=value_dim, ROTATED_WIDTH=max(32, next_power_of_2(layout.head_dim - value_dim)),
        WIDTH=padded(value_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, USE_PDL=use_pdl(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(),
    )  # fmt: skip
