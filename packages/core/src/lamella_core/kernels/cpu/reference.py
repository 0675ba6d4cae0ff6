"""Torch versions of the CPU operations: what each one means, and what runs where no compiler is found.

Legend: M or T rows (tokens), K input features, N output features, H hidden size, Hq query heads, Hkv key/value heads,
D head size, S sequences. The "panel16" layout holds a weight [N, K] as [ceil(N/16), K, 16]: 16 output features side by
side, zero padded. float32 results of a row are independent of the other rows here too, at the price of speed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella_core.kernels.sparsity import BlockSparsity

PANEL = 16
ROW_TILE = 16  # rows per float32 product of `linear_tiled`
PANEL_TILE = 128  # panels unpacked at a time: 2048 output features


def pack_panels(w: Tensor) -> Tensor:
    """Lay a row-major weight [N, K] out as panels [ceil(N/16), K, 16], zero padded, same dtype."""
    n, k = w.shape
    panels = -(-n // PANEL)
    packed = w.new_empty(panels, k, PANEL)
    whole = n // PANEL
    packed[:whole] = w[: whole * PANEL].reshape(whole, PANEL, k).transpose(1, 2)
    if whole < panels:
        packed[whole].zero_()
        packed[whole, :, : n - whole * PANEL] = w[whole * PANEL :].t()
    return packed


def unpack_panels(packed: Tensor, n: int) -> Tensor:
    """Give back the row-major weight [n, K] of panels [ceil(n/16), K, 16]."""
    panels, k, width = packed.shape
    return packed.transpose(1, 2).reshape(panels * width, k)[:n].contiguous()


def panel_rows(packed: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` [T] of the weight that ``packed`` holds: [T, K]. For embedding lookup from a tied head."""
    return packed[ids // PANEL, :, ids % PANEL]


def linear_tiled(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [M, K] by w [N, K] transposed, in products of always ROW_TILE rows (the last tile zero padded).

    The library that multiplies chooses its schedule by shape; one shape for all M keeps a row's result independent of
    how many rows it came with.
    """
    m = x.shape[0]
    out = x.new_empty(m, w.shape[0])
    for start in range(0, m, ROW_TILE):
        rows = min(ROW_TILE, m - start)
        tile = x[start : start + rows]
        if rows < ROW_TILE:
            tile = torch.cat([tile, tile.new_zeros(ROW_TILE - rows, x.shape[1])])
        out[start : start + rows] = F.linear(tile, w, bias)[:rows]
    return out


def linear_upcast(x: Tensor, w: Tensor, bias: Tensor | None = None, *, rows_per_tile: int = 1024) -> Tensor:
    """Multiply x [M, K] by w [N, K] transposed in float32, widening ``rows_per_tile`` rows of w at a time."""
    wide = x.float()
    out = x.new_empty(x.shape[0], w.shape[0])
    for start in range(0, w.shape[0], rows_per_tile):
        stop = min(start + rows_per_tile, w.shape[0])
        part = F.linear(wide, w[start:stop].float())
        out[:, start:stop] = part if bias is None else part + bias[start:stop].float()
    return out


def matmul_panels(
    x: Tensor, packed: Tensor, n: int, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Multiply x [M, K] by a panel16 weight of n output features, plus bias [n]: [M, n], accumulated in float32."""
    out = x.new_empty(x.shape[0], n, dtype=out_dtype or x.dtype)
    wide = x.float()
    for first in range(0, packed.shape[0], PANEL_TILE):
        start, stop = first * PANEL, min((first + PANEL_TILE) * PANEL, n)
        rows = unpack_panels(packed[first : first + PANEL_TILE], stop - start).float()
        part = linear_tiled(wide, rows) if x.dtype == torch.float32 else F.linear(wide, rows)
        out[:, start:stop] = part if bias is None else part + bias[start:stop].float()
    return out


def gemv_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [M, K] by a row-major weight [N, K] transposed, plus bias [N]: [M, N], accumulated in float32."""
    return linear_tiled(x, w, bias) if x.dtype == torch.float32 else linear_upcast(x, w, bias)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of x [T, H] (plus residual [T, H]) in float32, cast to x's dtype, times weight [H].

    With ``unit_offset`` it is multiplied by 1 + weight, in float32, before the cast.

    Returns:
        The normed rows, and the sum that was normed (x itself without a residual): both [T, H].
    """
    if residual is not None:
        x = x + residual
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (wide * (weight.float() + 1.0)).to(x.dtype), x
    return wide.to(x.dtype) * weight, x


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Gated activation silu(gate) * up in float32 for rows [gate, up] of [T, 2I]: [T, I] in the input's dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    # Not F.silu: torch gives the last elements of a buffer another exponential, so bits would depend on the rows.
    return (gate / (-gate).exp_().add_(1.0) * up).to(gate_up.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    wide, half = x[..., :rotary_dim].float(), rotary_dim // 2
    c, s = cos[:, None, :], sin[:, None, :]
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    pair = (a * c - b * s, b * c + a * s)
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


def rope_inplace(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False) -> None:
    """Rotate the first ``rotary_dim`` values of each head of q [T, Hq, D] and k [T, Hkv, D] in place.

    cos and sin are [T, rotary_dim / 2] float32. A pair is (x[i], x[i + rotary_dim/2]), or (x[2i], x[2i+1]) when
    interleaved.
    """
    for x in (q, k):
        x[..., :rotary_dim] = _rotated(x, cos, sin, rotary_dim, interleaved).to(x.dtype)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store k, v [T, Hkv, D] in caches [num_blocks, Hkv, block_size, D] at slots [T]; negative ones are skipped."""
    for rows, cache in ((k, k_cache), (v, v_cache)):
        write_rows(rows, cache, slots)


def write_rows(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Store rows [T, Hkv, D], keys or values, in their cache; see `write_kv`."""
    block_size = cache.shape[2]
    if bool((slots < 0).any()):
        kept = slots >= 0
        rows, slots = rows[kept], slots[kept]
    cache[slots // block_size, :, slots % block_size] = rows


def _visible(
    positions: Tensor, num_keys: int, present: Tensor, window: int, num_sinks: int, is_chunked: bool, prefix: int
) -> Tensor:
    """[queries, keys] bool: causal or in one prefix, inside the window or chunk or among the sinks, and not evicted."""
    keys = torch.arange(num_keys)
    distance = positions[:, None] - keys[None, :]
    seen = (distance >= 0) | (torch.maximum(positions[:, None], keys[None, :]) < prefix)
    if window > 0:
        oldest = positions // window * window if is_chunked else positions + 1 - window
        seen &= (keys[None, :] >= oldest[:, None]) | (keys[None, :] < num_sinks)
    return seen & present[None, :num_keys]


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, softcap: float, sink_logits: Tensor | None
) -> Tensor:
    """Softmax attention of q [Q, Hkv, G, D] over keys [L, Hkv, D] with bias [Hkv, G, Q, L]: [Q, Hkv, G, Dv].

    Values are [L, Hkv, Dv].
    """
    scores = torch.matmul(q.permute(1, 2, 0, 3), keys.permute(1, 2, 0)[:, None]) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sink_logits is not None:
        extra = sink_logits.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    blind = torch.isneginf(scores).all(dim=-1, keepdim=True)  # rows that see no key: zero
    weights = weights.masked_fill(blind, 0.0)
    return torch.matmul(weights[..., : keys.shape[0]], values.permute(1, 0, 2)[:, None]).permute(2, 0, 1, 3)


def _gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """First ``length`` keys or values of one sequence from its blocks, zero where evicted: [length, Hkv, D] float32."""
    blocks = cache[table.clamp_min(0)].masked_fill((table < 0)[:, None, None, None], 0.0)
    return blocks.transpose(1, 2).flatten(0, 1)[:length].float()


def alibi_bias(slopes: Tensor, positions: Tensor, keys: Tensor, rounded_scale: float | None) -> Tensor:
    """What ALiBi adds to the scores of queries at ``positions`` [n] for ``keys`` [K]: [Hq, n or 1, K] float32.

    With a ``rounded_scale`` it is that times bfloat16(slope * bfloat16(key)), see `AttentionSpec.rounds_alibi`.
    """
    slopes = slopes.float()[:, None, None]
    if rounded_scale is None:
        return slopes * (keys[None, :] - positions[:, None])
    return (slopes * keys.bfloat16().float()).bfloat16().float() * rounded_scale


def paged_attention(  # noqa: PLR0913 - mirrors the native kernel
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
    num_sinks: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    is_chunked: bool = False,
    prefix_lens: Tensor | None = None,
    sparsity: BlockSparsity | None = None,
    rounds_alibi: bool = False,
) -> Tensor:
    """Causal attention over a paged cache; see `ops.paged_attention`. float32 goes query by query (see the module)."""
    num_heads = q.shape[1]
    kv_heads, block_size = k_cache.shape[1:3]
    out = q.new_zeros(*q.shape[:2], v_cache.shape[3])
    starts, lengths = query_start.tolist(), context_lens.tolist()
    prefixes = [0] * len(lengths) if prefix_lens is None else prefix_lens.tolist()
    for s, length in enumerate(lengths):
        begin, end = starts[s], starts[s + 1]
        table = block_tables[s, : -(-length // block_size)].long()
        keys, values = _gather(k_cache, table, length), _gather(v_cache, table, length)
        present = (table >= 0).repeat_interleave(block_size)
        step = 1 if q.dtype == torch.float32 else end - begin
        for first in range(begin, end, step or 1):
            chunk = q[first : first + step].float().unflatten(1, (kv_heads, num_heads // kv_heads))
            positions = torch.arange(first, first + step) - end + length
            limit = max(int(positions[-1]) + 1, prefixes[s] if positions[0] < prefixes[s] else 0)
            seen = _visible(positions, limit, present, sliding_window, num_sinks, is_chunked, prefixes[s])
            if sparsity is not None:
                seen = seen & sparsity.seen(positions, torch.arange(limit), num_heads)
            bias = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
            bias = bias.expand(num_heads, *seen.shape[-2:]).unflatten(0, (kv_heads, chunk.shape[2]))
            if alibi_slopes is not None:
                alibi = alibi_bias(alibi_slopes, positions, torch.arange(limit), scale if rounds_alibi else None)
                bias = bias + alibi.unflatten(0, (kv_heads, chunk.shape[2]))
            sinks = None if sink_logits is None else sink_logits.float()
            part = _attend(chunk, keys[:limit], values[:limit], bias, scale, softcap, sinks)
            out[first : first + step] = part.flatten(1, 2).to(q.dtype)
    return out
