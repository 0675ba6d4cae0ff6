"""Attention of one query per sequence over its paged keys: bound by reading them.

A program owns one sequence, the query heads of one key/value head (padded to 16 rows, what a matrix unit takes) and a
part of the keys, if these are split at all. Which keys is found on the device from the sequence's length, so the grid
depends only on the number of sequences and the greatest length, and a captured launch serves all lengths. Parts are
joined by the program of a sequence and head that ends last (a counter in the workspace tells), without a second kernel.

The block table is read one tile ahead of the keys; these are on their way ``num_stages`` tiles ahead. Lengths, rows and
tables are written before a step's first kernel, so they are read before the kernel before has ended. Float8 keys are
read as words of two, because matrix units take 16-bit words transposed from shared memory and no others; even and odd
columns are multiplied on their own.

Shape legend: see `common`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.errors import ConfigError
from lamella_core.kernels.sparsity import BlockSparsity
from lamella_core.kernels.triton.attention.common import (
    LOWEST,
    UNALIGNED,
    Layout,
    finish,
    first_visible_tile,
    head_cache,
    in_pattern,
    key_offsets,
    layout_of,
    load_pages,
    narrow_query,
    num_processors,
    oldest_key,
    result_like,
    scales_of,
    shape_scores,
    softmax_step,
    storage,
    widen_pairs,
)
from lamella_core.kernels.triton.attention.decode_plan import (
    WORTH_SPLITTING,
    Split,
    Tile,
    Workspace,
    choose_split,
    choose_tile,
    decode_workspace,
    fitting,
    rows_per_program,
)
from lamella_core.kernels.triton.launch import launch_options, use_pdl

Parking = tuple[Tensor | None, Tensor | None, Tensor | None]
WORTH = tl.constexpr(WORTH_SPLITTING)
_NONE: Parking = (None, None, None)


@triton.jit
def _load_query(q_ptr, heads, valid, FIRST: tl.constexpr, STEP: tl.constexpr, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns columns FIRST, FIRST + STEP, ... of one token's queries of some heads: [M, D padded / STEP]."""
    cols = FIRST + tl.arange(0, L.padded_dim // STEP) * STEP
    at = q_ptr + heads[:, None] * L.q_head_stride + cols[None, :]
    return narrow_query(tl.load(at, valid[:, None] & (cols < L.head_dim)[None, :], other=0.0), L)


@triton.jit
def _tile_at(step, first, sink_tiles):  # type: ignore[no-untyped-def]
    """Returns the tile of a step: sinks come first, then what the window covers."""
    return step + tl.where(step >= sink_tiles, first - sink_tiles, 0)


@triton.jit
def _scores(q_even, q_odd, k, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns [M, K] products of queries with keys, these [K, D] or, if float8, words of two."""
    if L.float8:
        even, odd = widen_pairs(k, L)
        scores = tl.dot(q_even, tl.trans(even), input_precision="ieee")
        scores = tl.dot(q_odd, tl.trans(odd), scores, input_precision="ieee")
    else:
        scores = tl.dot(q_even, tl.trans(k), input_precision="ieee")
    return scores


@triton.jit
def _add_values(acc_even, acc_odd, weights, v, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds weights [M, K] times values, these [K, D] or, if float8, words of two; only then is ``acc_odd`` used."""
    weights = weights.to(L.dtype)
    if L.float8:
        even, odd = widen_pairs(v, L)
        acc_even = tl.dot(weights, even, acc_even, input_precision="ieee")
        acc_odd = tl.dot(weights, odd, acc_odd, input_precision="ieee")
    else:
        acc_even = tl.dot(weights, v, acc_even, input_precision="ieee")
    return acc_even, acc_odd


@triton.jit
def _attend_part(  # type: ignore[no-untyped-def]
    q_even,  # [M, D padded], or its even columns if float8
    q_odd,
    k_ptr,  # [N, P, D] of this key/value head; as words of two if float8
    v_ptr,
    table_ptr,  # [B] of this sequence
    pages,  # of its first tile
    length,
    first,  # tile in which the window begins
    sink_tiles,  # tiles of sinks before that one
    begin,  # steps of this part
    end,
    factor,  # of products
    slopes,  # [M] or None
    heads,  # [M]
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Returns the softmax of a part: acc (even and odd columns) [M, D padded / STEP], maximum and sum [M]."""
    BLOCK_M: tl.constexpr = q_even.shape[0]
    WIDTH: tl.constexpr = q_even.shape[1]
    STEP: tl.constexpr = 2 if L.float8 else 1
    cols = tl.arange(0, WIDTH)[None, :]
    in_row = cols < L.head_dim // STEP
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # added up at the end: warps share no sums on the way
    acc_even = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    acc_odd = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    last_page = tl.maximum(length - 1, 0) // L.page
    for step in range(begin, end):
        tile = _tile_at(step, first, sink_tiles)
        next_pages = load_pages(table_ptr, _tile_at(step + 1, first, sink_tiles), last_page, L, BLOCK_N)
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = keys < length
        if L.window > 0:
            seen = seen & ((keys >= oldest_key(length - 1, L)) | (keys < L.sinks)) & (pages >= 0)
        offsets = key_offsets(pages, tile, L, BLOCK_N, STEP) + cols
        mask = seen[:, None] & in_row
        k = tl.load(k_ptr + offsets, mask, other=0)
        v = tl.load(v_ptr + offsets, mask, other=0)
        distances = (keys - (length - 1))[None, :]
        scores, rest = shape_scores(_scores(q_even, q_odd, k, L), factor, keys, distances, slopes, L)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        if L.sparse_block > 0:
            scores = tl.where(in_pattern(length - 1, heads, keys, L), scores, float("-inf"))
        weights, highest, fade = softmax_step(scores, rest, highest)
        sums = sums * fade[:, None] + weights
        acc_even, acc_odd = _add_values(acc_even * fade[:, None], acc_odd * fade[:, None], weights, v, L)
        pages = next_pages
    return acc_even, acc_odd, highest, tl.sum(sums, axis=1)


@triton.jit
def _join_parts(  # type: ignore[no-untyped-def]
    partial_ptr,  # [parts, ROWS, WIDTH]
    stats_ptr,  # [parts, 2, ROWS]
    parts,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Returns the softmax over all parts: acc [ROWS, WIDTH], maximum and sum [ROWS]."""
    AT_ONCE: tl.constexpr = max(1, 4096 // (ROWS * WIDTH))
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for begin in range(0, parts, AT_ONCE):
        part = begin + tl.arange(0, AT_ONCE)
        there = (part < parts)[:, None]
        at = stats_ptr + part[:, None] * (2 * ROWS) + rows[None, :]
        maxima = tl.load(at, there, other=LOWEST, cache_modifier=".cg")
        sums = tl.load(at + ROWS, there, other=0.0, cache_modifier=".cg")
        acc_at = partial_ptr + (part[:, None, None] * ROWS + rows[None, :, None]) * WIDTH + cols[None, None, :]
        accs = tl.load(acc_at, there[:, :, None], other=0.0, cache_modifier=".cg")
        now = tl.maximum(highest, tl.max(maxima, axis=0))
        share, fade = tl.exp2(maxima - now[None, :]), tl.exp2(highest - now)
        total = total * fade + tl.sum(sums * share, axis=0)
        acc = acc * fade[:, None] + tl.sum(accs * share[:, :, None], axis=0)
        highest = now
    return acc, highest, total


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    acc,  # [M, D padded]
    highest,  # [M]
    total,  # [M]
    first_member,  # of the group's heads, the one of row 0
    out_ptr,  # [G, D] of this sequence and group
    sinks_ptr,  # [G] of this group, or None
    v_scale,
    out_scale,  # or None
    L: tl.constexpr,
):
    """Ends the softmax and stores the results of the group's heads."""
    members = first_member + tl.arange(0, acc.shape[0])
    valid = members < L.group
    sink_ptrs = None if sinks_ptr is None else sinks_ptr + tl.minimum(members, L.group - 1)
    out = finish(acc, highest, total, sink_ptrs, v_scale, out_scale, L)
    cols = tl.arange(0, L.padded_dim)
    mask = valid[:, None] & (cols < L.head_dim)[None, :]
    tl.store(out_ptr + members[:, None] * L.head_dim + cols[None, :], out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _park(  # type: ignore[no-untyped-def]
    acc,  # [M, D padded]
    highest,  # [M]
    total,  # [M]
    part,
    partial_ptr,  # [parts, ROWS, D padded]
    stats_ptr,  # [parts, 2, ROWS]
    counter_ptr,
    ROWS: tl.constexpr,
):
    """Stores the first ROWS rows of a part; returns how many parts were stored before it."""
    rows, cols = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    kept = rows < ROWS
    stats_ptr += part * (2 * ROWS)
    tl.store(partial_ptr + (part * ROWS + rows)[:, None] * acc.shape[1] + cols[None, :], acc, kept[:, None])
    tl.store(stats_ptr + rows, highest, kept)
    tl.store(stats_ptr + ROWS + rows, total, kept)
    tl.debug_barrier()  # all threads have stored before the counter says so
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def _divide(length, parts, least_steps, L: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns where a sequence's window begins and how many tiles of sinks are before it, its steps, and a part's.

    Short sequences stay whole: joining would take longer.
    """
    first = first_visible_tile(length - 1, L, BLOCK_N)
    sink_tiles = tl.minimum((L.sinks + BLOCK_N - 1) // BLOCK_N, first)
    steps = (length + BLOCK_N - 1) // BLOCK_N - first + sink_tiles
    per_part = tl.maximum((steps + parts - 1) // parts, least_steps)
    return first, sink_tiles, steps, tl.where(steps < WORTH * least_steps, tl.maximum(steps, 1), per_part)


# fmt: off
@triton.jit(
    do_not_specialize=["parts", "least_steps", "table_stride", "scale"], do_not_specialize_on_alignment=UNALIGNED,
)
def _decode_kernel(  # type: ignore[no-untyped-def]
    out_ptr, q_ptr,  # [S, Hq, D]
    k_ptr, v_ptr,  # [N, Hkv, P, D]
    tables_ptr,  # [*, B] int32
    rows_ptr, lengths_ptr,  # [S] int32
    alibi_ptr, sinks_ptr,  # [Hq], or None
    kv_scales_ptr, out_scale_ptr,  # [2] and [] float32, or None
    partial_ptr, stats_ptr, counters_ptr,  # see `Workspace`; None: no sequence is split
    table_stride, scale, parts,
    least_steps,  # of a part
    L: tl.constexpr,
    ROWS: tl.constexpr,  # least power of two that holds the heads of this program
    BLOCK_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One part of one sequence's keys for the query heads of one key/value head, or for as many as a program takes."""
    BLOCK_M: tl.constexpr = max(ROWS, 16)
    CHUNKS: tl.constexpr = (L.group + ROWS - 1) // ROWS  # programs per group
    STEP: tl.constexpr = 2 if L.float8 else 1
    part, chunk, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length, row = tl.load(lengths_ptr + seq), tl.load(rows_ptr + seq).to(tl.int64)
    first, sink_tiles, steps, per_part = _divide(length, parts, least_steps, L, BLOCK_N)
    used = tl.maximum((steps + per_part - 1) // per_part, 1)
    if part >= used:
        return
    table_ptr = tables_ptr + row * table_stride
    begin, last_page = part * per_part, tl.maximum(length - 1, 0) // L.page
    pages = load_pages(table_ptr, _tile_at(begin, first, sink_tiles), last_page, L, BLOCK_N)
    factor, v_scale = scales_of(kv_scales_ptr, scale)
    out_scale = None if out_scale_ptr is None else tl.load(out_scale_ptr)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    kv_head, first_member = chunk // CHUNKS, (chunk % CHUNKS) * ROWS
    first_head = kv_head * L.group
    heads = first_head + first_member + tl.arange(0, BLOCK_M)
    valid = heads < first_head + L.group
    slopes = None if alibi_ptr is None else tl.load(alibi_ptr + heads, valid, other=0.0).to(tl.float32)
    q_ptr += seq * L.q_token_stride
    acc, odd, highest, total = _attend_part(
        _load_query(q_ptr, heads, valid, 0, STEP, L), _load_query(q_ptr, heads, valid, STEP - 1, STEP, L),
        head_cache(k_ptr, kv_head, STEP, L), head_cache(v_ptr, kv_head, STEP, L), table_ptr, pages,
        length, first, sink_tiles, begin, tl.minimum(begin + per_part, steps), factor, slopes, heads, L, BLOCK_N,
    )
    if L.float8:
        acc = tl.interleave(acc, odd)
    out_ptr += seq * (L.heads * L.head_dim) + first_head * L.head_dim
    sinks_ptr = None if sinks_ptr is None else sinks_ptr + first_head
    if partial_ptr is None:
        _write(acc, highest, total, first_member, out_ptr, sinks_ptr, v_scale, out_scale, L)
    elif used == 1:
        _write(acc, highest, total, first_member, out_ptr, sinks_ptr, v_scale, out_scale, L)
    else:
        index = seq * tl.num_programs(1) + chunk
        partial_ptr += index * parts * (ROWS * L.padded_dim)
        stats_ptr += index * parts * (2 * ROWS)
        if _park(acc, highest, total, part, partial_ptr, stats_ptr, counters_ptr + index, ROWS) == used - 1:
            tl.store(counters_ptr + index, 0)
            joined, most, whole = _join_parts(partial_ptr, stats_ptr, used, ROWS, L.padded_dim)
            _write(joined, most, whole, first_member, out_ptr, sinks_ptr, v_scale, out_scale, L)
# fmt: on


def _parking(workspace: Workspace | None, programs: int, rows: int, layout: Layout, device: torch.device) -> Parking:
    """Returns the pointers of a workspace in which ``programs`` parts of ``rows`` heads have room."""
    space = workspace or decode_workspace(layout.heads, layout.heads // layout.group, layout.head_dim, device)
    if programs > space.counters.numel() or programs * rows * layout.padded_dim > space.partial.numel():
        raise ConfigError(f"the workspace is too small for {programs} parts; make it by decode_workspace, or larger")
    return space.partial, space.stats, space.counters


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    table_rows: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    max_context_len: int,
    sliding_window: int = 0,
    is_chunked: bool = False,
    num_sinks: int = 0,
    softcap: float = 0.0,
    sparsity: BlockSparsity | None = None,
    alibi_slopes: Tensor | None = None,
    rounds_alibi: bool = False,
    sink_logits: Tensor | None = None,
    kv_scales: Tensor | None = None,
    out_scale: Tensor | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    split: Split | None = None,
) -> Tensor:
    """Attention of one query per sequence over all its keys: [S, Hq, D]. Other keywords: see `common`.

    Nothing is read back; a captured launch serves other lengths up to ``max_context_len``, tables and rows.

    * q [S, Hq, D]: the query's own key is in the cache.
    * context_lens [S] int32: keys of each sequence; where 0 the result is zero.
    * max_context_len: upper bound of ``context_lens``; only speed depends on it.
    * workspace: see `decode_workspace`; made for this call if it is needed and missing.
    * tile: other than the one for this layer.
    * split: other than the one for this batch; needs a workspace large enough.
    """
    mask = (sliding_window, num_sinks, softcap, is_chunked, sparsity, rounds_alibi)
    layout = layout_of(q, k_cache, v_cache, scale, *mask)
    out, num_seqs = result_like(q, out_scale, out), q.shape[0]
    if num_seqs == 0:
        return out
    rows = rows_per_program(layout.group)
    chunks = layout.heads // layout.group * -(-layout.group // rows)
    processors = num_processors(q.device)
    if tile is None:
        itemsize = k_cache.element_size()
        tile = choose_tile(layout.padded_dim, itemsize, num_seqs * chunks, max_context_len, processors)
        tile = fitting(tile, layout.padded_dim * itemsize, q.device)
    split = split or choose_split(num_seqs, chunks, max_context_len, processors)
    parking = _parking(workspace, num_seqs * chunks * split.parts, rows, layout, q.device) if split.parts > 1 else _NONE
    _decode_kernel[split.parts, chunks, num_seqs](
        storage(out), q, storage(k_cache), storage(v_cache), block_tables, table_rows, context_lens,
        alibi_slopes, sink_logits, kv_scales, out_scale, *parking, block_tables.stride(0), scale,
        split.parts, -(-split.least_keys // tile.block_n), L=layout, ROWS=rows, BLOCK_N=tile.block_n, USE_PDL=use_pdl(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(),
    )  # fmt: skip
    return out
