"""Torch versions of the matmul kernels: the meaning of each operation, and what runs where no compiler is found.

Legend: M rows (tokens), K input features, N output features. The "panel16" layout holds a weight [N, K] as
[ceil(N/16), K, 16]: 16 output features side by side, zero padded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 16
ROW_TILE = 16  # rows per float32 product of `linear_tiled`
PANEL_TILE = 128  # panels unpacked at a time: 2048 output features


def pack_panels(w: Tensor) -> Tensor:
    """Lay a row-major weight [N, K] out as panels [ceil(N/16), K, 16], zero padded, same dtype."""
    n, k = w.shape
    panels = -(-n // PANEL)
    packed = w.new_empty(panels, k, PANEL)
    whole = n // PANEL
    packed[:whole] = w[: whole * PANEL].view(whole, PANEL, k).transpose(1, 2)
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
    """Multiply x [M, K] by w [N, K] transposed in float32, converting ``rows_per_tile`` rows of w at a time; x's dtype."""
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
    if x.dtype == torch.float32:
        return linear_tiled(x, w, bias)
    return linear_upcast(x, w, bias)
