"""How decoding attention divides its work: steps over keys, parts of them, and the memory in which parts meet."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamella_core.kernels.triton.attention.common import num_processors, shared_memory
from lamella_core.kernels.triton.launch import next_power_of_2

PROGRAMS_PER_PROCESSOR = 1  # what splitting fills idle processors up to: one reads as fast as several do
MOST_PROGRAMS_PER_PROCESSOR = 16  # what splitting long sequences among short ones may lead to
SHORT_PART, LONG_PART = 128, 2048  # least keys per part in the first case and in the second
WORTH_SPLITTING = 3  # least parts: joining takes 3 us, as much as 256 keys do
SHORT_CONTEXT = 512  # keys
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
        least_keys: keys that a part has at least; sequences of less than `WORTH_SPLITTING` times that stay whole.
    """

    parts: int
    least_keys: int


@dataclass(frozen=True)
class Workspace:
    """Where parts wait to be joined; serves any number of calls, one after another on one stream."""

    partial: Tensor  # float32: [programs, rows, D padded]
    stats: Tensor  # float32: [programs, 2, rows], maximum and sum
    counters: Tensor  # int32: parts that are done, of each sequence and group; zero between calls


@functools.cache
def fitting(tile: Tile, row_bytes: int, device: torch.device) -> Tile:
    """Returns the tile with as many stages as fit into two thirds of a processor's memory; the rest is for products."""
    stages = 2 * shared_memory(device) // 3 // (2 * tile.block_n * row_bytes)
    return replace(tile, num_stages=max(1, min(tile.num_stages, stages)))


def rows_per_program(group: int) -> int:
    """Heads of a group that one program takes, as a power of two."""
    return min(next_power_of_2(group), MOST_ROWS)


def choose_split(num_seqs: int, num_groups: int, max_context_len: int, processors: int) -> Split:
    """Returns how to divide ``num_seqs`` sequences times ``num_groups`` groups of heads.

    Idle processors are filled; and where they are busy, one very long sequence shall not be what all wait for.

    Measured on an H100 (132 processors, 8 groups, bf16, tiles of 64 keys), microseconds by parts:
    1 x 4096: 59.4 (1), 18.8 (4), 12.9 (8), 13.5 (16), 22.3 (32); 4 x 4096: 29.8 (4), 34.6 (8); 8 x 1024: 18.5 (1),
    17.9 (2), 21.9 (4); 16 x 1024: 27.4 (1), 34.1 (2). Joining parts takes 3 us, as much as 256 keys of one part do,
    so sequences of less than `WORTH_SPLITTING` least parts stay whole.

    A captured launch knows only the engine's limit of ``max_context_len``. Parts of shorter sequences that get no keys
    end at once: with idle processors they are at most one per processor and cost nothing beside the others; else at
    most `MOST_PROGRAMS_PER_PROCESSOR`, of which a few run at a time, and each takes about 1 us.
    """
    programs = max(1, num_seqs * num_groups)
    idle = PROGRAMS_PER_PROCESSOR * processors // programs
    most, least = (idle, SHORT_PART) if idle > 1 else (MOST_PROGRAMS_PER_PROCESSOR * processors // programs, LONG_PART)
    if most <= 1 or max_context_len < WORTH_SPLITTING * least:
        return Split(1, least)
    return Split(min(most, -(-max_context_len // least)), least)


def choose_tile(padded_dim: int, itemsize: int, programs: int, max_context_len: int, processors: int) -> Tile:
    """Returns the tile for heads of ``padded_dim`` values of ``itemsize`` bytes.

    Measured on an H100 (heads of 128, 8 groups; sequences x keys, microseconds):

    * float8: where each processor has one program at most, the most keys at once. A decoding step of Llama-3.1-8B takes
      2701 with (256, 8, 1) and 2764 with (64, 4, 3) (1 x 192); 3666 with (256, 8, 2) and 3812 with (128, 4, 3)
      (16 x 1000), 4856 and 5517 (16 x 4000); but where long sequences are split, 2816 and 2771 (1 x 1000), 3054 and
      2950 (1 x 4000). (64, 4, 3) where processors have several (32 x 1024: 28.4, with 128 keys 32.0; 256 x 128: 32.1
      to 36.1), (32, 1, 4) for very many short ones (2048 x 128: 204.7, with 64 keys 215.3; but 256 x 1024: 201.0 to
      187.0);
    * bf16: (64, 4, 3), but (32, 4, 4) where a processor has two to four programs (32 x 1024: 50.7 to 53.7; 64 x 4096:
      362.0 to 381.7; but 256 x 1024: 363.7 to 358.6).

    Args:
        padded_dim: head size, as a power of two.
        itemsize: of the caches.
        programs: sequences times groups of heads.
        max_context_len: bound of the keys of a sequence; a captured launch knows only the engine's limit.
        processors: of the device.
    """
    row_bytes = padded_dim * itemsize
    if itemsize == 4:
        return Tile(16 if row_bytes >= 1024 else 32, 4, 2)
    if row_bytes > 256:
        return Tile(32, 4, 3)
    if row_bytes > 128:
        return Tile(32, 4, 4) if processors < programs <= 4 * processors else Tile(64, 4, 3)
    if programs > processors:
        is_short = max_context_len <= SHORT_CONTEXT and programs >= 32 * processors
        return Tile(32, 1, 4) if is_short else Tile(64, 4, 3)
    if max_context_len < WORTH_SPLITTING * SHORT_PART:
        return Tile(256, 8, 1)
    return Tile(128, 4, 3) if 2 * programs <= processors else Tile(256, 8, 2)


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
