"""How decoding attention divides its work: steps over keys, parts of them, and the memory in which parts meet."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella_core.kernels.triton.attention.common import num_processors
from lamella_core.kernels.triton.launch import next_power_of_2

PROGRAMS_PER_PROCESSOR = 2  # what splitting fills idle processors up to
MOST_PROGRAMS_PER_PROCESSOR = 16  # what splitting long sequences among short ones may lead to
SHORT_PART, LONG_PART = 256, 4096  # least keys per part in the first case and in the second
LEAST_ROWS, MOST_ROWS = 16, 64  # heads per program


@dataclass(frozen=True, slots=True)
class Tile:
    """How `_decode_kernel` walks over keys.

    Attributes:
        block_n: keys per step.
        num_warps: warps per program.
        num_stages: steps whose keys are in shared memory or on their way to it.
    """

    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Split:
    """How the keys of each sequence are divided among programs.

    Attributes:
        parts: programs per sequence and group of heads; of short sequences only some do anything.
        least_keys: keys that a part has at least.
    """

    parts: int
    least_keys: int


@dataclass(frozen=True)
class Workspace:
    """Where parts wait to be joined; serves any number of calls, one after another on one stream."""

    partial: Tensor  # float32: [programs, rows, D padded]
    stats: Tensor  # float32: [programs, 2, rows], maximum and sum
    counters: Tensor  # int32: parts that are done, of each sequence and group; zero between calls


def rows_per_program(group: int) -> int:
    """Heads of a group that one program takes, as a power of two."""
    return min(next_power_of_2(group), MOST_ROWS)


def choose_split(num_seqs: int, num_groups: int, max_context_len: int, processors: int) -> Split:
    """Returns how to divide ``num_seqs`` sequences times ``num_groups`` groups of heads.

    Idle processors are filled; and where they are busy, one very long sequence shall not be what all wait for.
    """
    programs = max(1, num_seqs * num_groups)
    idle = PROGRAMS_PER_PROCESSOR * processors // programs
    if idle > 1:
        return Split(max(1, min(idle, -(-max_context_len // SHORT_PART))), SHORT_PART)
    spread = MOST_PROGRAMS_PER_PROCESSOR * processors // programs
    return Split(max(1, min(spread, -(-max_context_len // LONG_PART))), LONG_PART)


@functools.cache
def choose_tile(padded_dim: int, itemsize: int, page: int) -> Tile:
    """Returns the tile for heads of ``padded_dim`` values of ``itemsize`` bytes in blocks of ``page`` tokens."""
    row_bytes = padded_dim * itemsize
    if itemsize == 4:
        return Tile(16 if row_bytes >= 1024 else 32, 4, 2)
    if row_bytes <= 128:
        return Tile(128, 4, 3)
    return Tile(64, 4, 3) if row_bytes <= 256 else Tile(32, 4, 3)


def decode_workspace(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str) -> Workspace:
    """Returns the memory in which `decode_attention` of such a layer joins parts, for any batch: a few MiB."""
    device = torch.device(device)
    group = num_heads // num_kv_heads
    rows, width = rows_per_program(group), next_power_of_2(max(head_dim, 32))
    programs = MOST_PROGRAMS_PER_PROCESSOR * num_processors(device)
    return Workspace(
        partial=torch.empty(programs, rows, width, dtype=torch.float32, device=device),
        stats=torch.empty(programs, 2, rows, dtype=torch.float32, device=device),
        counters=torch.zeros(programs, dtype=torch.int32, device=device),
    )
