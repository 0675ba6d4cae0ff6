"""How attention of prompt chunks divides its work: rows of queries, and steps over keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from lamella_core.kernels.triton.attention.common import shared_memory

SHORT_CONTEXT, LONG_CONTEXT = 1024, 4096  # keys: up to which tiles have few keys, and from which on many


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel whose programs own rows of queries divides the work.

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
def choose_tile(padded_dim: int, query_bytes: int, key_bytes: int, most_rows: int, most_keys: int) -> Tile:
    """Returns the tile for chunks of at most ``most_rows`` rows (queries times heads of a group) over ``most_keys``.

    Measured on an H100 (32 heads over 8 of 128, microseconds; (64, 32, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3)): bf16
    64 x 128: 82, 103, 146; 8 x 1000: 212, 222, 254; 4 x 2048: 368, 361, 383; 1 x 8192: 1382, 1233, 1161; 512 after
    7680: 233, 151, 144. Over float8 keys, which are widened in registers, few rows and many keys are best: (64, 128,
    4, 2) takes 474 for 4 x 2048, 205 for 512 after 7680, 44 for 20 after 2000; (128, 64, 8, 3) 513, 227, 59.
    """
    if query_bytes == 4:
        return Tile(16, 16 if padded_dim > 128 else 32, 4, 1)
    if most_rows <= 16:
        return Tile(16, 32 if padded_dim > 128 else 64, 4, 3)
    if padded_dim > 128:
        return Tile(64, 32, 4, 3) if most_rows <= 64 else Tile(128, 64, 8, 2)
    if key_bytes == 1:
        return Tile(64, 64, 4, 3) if most_rows <= 64 else Tile(64, 128, 4, 2)
    if most_keys <= SHORT_CONTEXT and most_rows > 64:
        return Tile(64, 32, 4, 3)
    return Tile(64, 64, 4, 3) if most_keys <= LONG_CONTEXT or most_rows <= 64 else Tile(128, 128, 8, 3)


@functools.cache
def fitting(tile: Tile, row_bytes: int, query_row_bytes: int, device: torch.device) -> Tile:
    """Returns the tile, or a smaller one if the device has not the shared memory for its queries and keys."""
    room, stages = shared_memory(device), 0
    for tile in (tile, Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)):  # noqa: B020 - ends at the one to take
        stages = (room - tile.block_m * query_row_bytes) // (2 * tile.block_n * row_bytes)
        if stages >= min(2, tile.num_stages):
            break
    return replace(tile, num_stages=max(1, min(tile.num_stages, stages)))
