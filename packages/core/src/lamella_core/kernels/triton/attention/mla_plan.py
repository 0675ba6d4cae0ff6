"""How attention over latents divides its work: rows, steps over keys, parts of them, and where parts meet."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella_core.kernels.triton.attention.common import num_processors, shared_memory
from lamella_core.kernels.triton.attention.prefill_plan import Tile
from lamella_core.kernels.triton.launch import next_power_of_2

LEAST_ROWS, MOST_ROWS = 16, 64  # per program: what a matrix unit takes, and what registers hold of results
MOST_PARTS = 64  # of a sequence's keys
LEAST_PART = 256  # keys
WORTH_SPLITTING = 2  # least parts
_SPARE_BYTES = 8 << 10  # of shared memory, for what is neither queries nor keys


@dataclass(frozen=True)
class Workspace:
    """Where parts of decoding steps wait to be joined; serves any number of calls, one after another on one stream."""

    partial: Tensor  # float32: [parts of all tiles, rows of a tile, V padded]
    stats: Tensor  # float32: [parts of all tiles, 2, rows of a tile], maximum and sum


@functools.cache
def choose_tile(head_dim: int, query_bytes: int, key_bytes: int, most_rows: int, device: torch.device) -> Tile:
    """Returns the tile for sequences of at most ``most_rows`` rows: the largest that shared memory holds."""
    rows = max(LEAST_ROWS, min(MOST_ROWS, next_power_of_2(most_rows)))
    if query_bytes == 4:
        return Tile(LEAST_ROWS, 16, 4, 1)
    warps = 8 if rows == MOST_ROWS else 4
    room = shared_memory(device) - _SPARE_BYTES
    widened = 2 if key_bytes == 1 else 0  # bytes of a number beside those that are read
    tiles = [Tile(rows, keys, warps, stages) for keys, stages in ((64, 2), (32, 2), (32, 1))]
    tiles += [Tile(LEAST_ROWS, 32, 4, 1), Tile(LEAST_ROWS, 16, 4, 1)]
    for tile in tiles:
        keys = tile.block_n * head_dim * (tile.num_stages * key_bytes + widened)
        if tile.block_m * head_dim * query_bytes + keys <= room:
            return tile
    return tiles[-1]


def choose_parts(num_tiles: int, max_context_len: int, processors: int) -> int:
    """Returns into how many parts to divide the keys of each of ``num_tiles`` tiles: what idle processors can take."""
    if max_context_len < WORTH_SPLITTING * LEAST_PART:
        return 1
    return max(1, min(processors // max(1, num_tiles), -(-max_context_len // LEAST_PART), MOST_PARTS))


def latent_workspace(num_heads: int, value_dim: int, device: torch.device | str) -> Workspace:
    """Returns the memory in which `latent_decode` of such a layer joins parts, for any batch."""
    device = torch.device(device)
    rows, width = max(LEAST_ROWS, min(MOST_ROWS, next_power_of_2(num_heads))), padded(value_dim)
    programs = num_processors(device)
    return Workspace(
        partial=torch.empty(programs, rows, width, dtype=torch.float32, device=device),
        stats=torch.empty(programs, 2, rows, dtype=torch.float32, device=device),
    )


def padded(size: int) -> int:
    """Returns the columns that kernels compute for so many numbers."""
    return max(32, next_power_of_2(size))
