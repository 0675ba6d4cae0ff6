"""Sorting tokens by expert on the device, for products over groups of rows.

A token goes to ``top_k`` experts: T * top_k assignments, a = token * top_k + choice. They are ordered by expert, each
expert's in order of their numbers, and an expert's part is padded to whole blocks of rows. How many blocks there are is
known on the device alone; what is launched is the most there can be, and those past the end do nothing. So nothing
waits for the device, and a recorded step holds for any routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.launch import launch_options, next_power_of_2, use_pdl

CHUNK = 2048  # assignments that a program looks at together
NUM_WARPS = 8
FEW_EXPERTS_HIT = 4  # fewer assignments than one for so many experts rarely meet in one


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which rows of a product each block of rows has.

    Unsorted blocks hold one row each, assignment a in block a; a weight that two of them need is read twice, the second
    time from the L2 cache.
    """

    count: int  # blocks that are launched
    experts: Tensor  # [assignments] int64, of the whole model: the experts of all tokens
    rows: Tensor | None = None  # [count * block_m] int32: assignments; too large ones are padding; None: unsorted
    expert_of: Tensor | None = None  # [count] int32: expert of this rank, -1 past the end; None: unsorted
    used: Tensor | None = None  # [1] int32: how many have an expert; None: unsorted
    places: Tensor | None = None  # [assignments] int32: where rows has each; nothing for other ranks' experts


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of a product.

    Attributes:
        values: one row per assignment, per token, or per place in blocks, each [K].
        scale: of float8 values: float32 of each row, or of each expert; None: of no float8.
        per_row: which of them.
    """

    values: Tensor
    scale: Tensor | None = None
    per_row: bool = False


def most_blocks(assignments: int, held: int, block_m: int) -> int:
    """Returns how many blocks of ``block_m`` rows assignments to ``held`` experts can need at most."""
    hit = min(assignments, held)
    return hit + (assignments - hit) // block_m


def needs_sorting(tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether sorting pays: else hardly two tokens share one of the model's experts."""
    return tokens > 1 and tokens * top_k > num_experts // FEW_EXPERTS_HIT


@triton.jit(do_not_specialize=["total"])
def _count_kernel(  # type: ignore[no-untyped-def]
    experts_ptr,  # [total] int64
    counts_ptr,  # [held] int32
    total,
    first,
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The number of assignments to one expert."""
    expert = tl.program_id(0) + first
    at = tl.arange(0, CHUNK)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    found = tl.zeros([CHUNK], tl.int32)
    for begin in range(0, total, CHUNK):
        found += (tl.load(experts_ptr + begin + at, mask=begin + at < total, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["total", "num_blocks"])
def _place_kernel(  # type: ignore[no-untyped-def]
    experts_ptr,  # [total] int64
    counts_ptr,  # [HELD] int32
    rows_ptr,  # [num_blocks * BLOCK_M] int32
    expert_of_ptr,  # [num_blocks] int32
    used_ptr,  # [1] int32
    places_ptr,  # [total] int32
    total,
    num_blocks,
    first,
    HELD: tl.constexpr,
    HELD_PADDED: tl.constexpr,  # a power of two
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """The blocks of one expert; the last expert's program also marks those that nobody has."""
    expert = tl.program_id(0)
    at = tl.arange(0, CHUNK)
    every = tl.arange(0, HELD_PADDED)
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    counts = tl.load(counts_ptr + every, mask=every < HELD, other=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    begin_block = tl.sum(tl.where(every < expert, blocks, 0), axis=0)
    end_block = begin_block + tl.sum(tl.where(every == expert, blocks, 0), axis=0)
    for block in range(begin_block, end_block, CHUNK):
        tl.store(expert_of_ptr + block + at, expert, mask=block + at < end_block)
    if expert == HELD - 1:
        for block in range(end_block, num_blocks, CHUNK):
            tl.store(expert_of_ptr + block + at, -1, mask=block + at < num_blocks)
        tl.store(used_ptr, end_block)
    place = begin_block * BLOCK_M
    for begin in range(0, total, CHUNK):
        is_mine = tl.load(experts_ptr + begin + at, mask=begin + at < total, other=-1) == expert + first
        order = tl.cumsum(is_mine.to(tl.int32), axis=0)
        tl.store(rows_ptr + place + order - 1, begin + at, mask=is_mine)
        tl.store(places_ptr + begin + at, place + order - 1, mask=is_mine)
        place += tl.max(order, axis=0)
    padding = tl.arange(0, BLOCK_M)
    tl.store(rows_ptr + place + padding, total, mask=place + padding < end_block * BLOCK_M)


def make_blocks(experts: Tensor, first: int, held: int, block_m: int) -> Blocks:
    """Sorts the assignments to this rank's experts into blocks of ``block_m`` rows, each of one expert.

    Args:
        experts: of each token, [T, top_k] int64, contiguous; those of other ranks get no block.
        first: number of this rank's first expert.
        held: experts of this rank.
        block_m: rows of a block, a power of two.
    """
    total = experts.numel()
    count = most_blocks(total, held, block_m)
    counts = torch.empty(held, dtype=torch.int32, device=experts.device)
    rows = torch.empty(count * block_m, dtype=torch.int32, device=experts.device)
    expert_of = torch.empty(count, dtype=torch.int32, device=experts.device)
    places = torch.empty(total + 1, dtype=torch.int32, device=experts.device)
    used, places = places[total:], places[:total]
    chunk = min(CHUNK, max(128, next_power_of_2(total)))
    common = {"CHUNK": chunk, "USE_PDL": use_pdl(), "num_warps": NUM_WARPS, **launch_options()}
    _count_kernel[(held,)](experts, counts, total, first, **common)
    _place_kernel[(held,)](
        experts, counts, rows, expert_of, used, places, total, count, first,
        HELD=held, HELD_PADDED=next_power_of_2(held), BLOCK_M=block_m, **common,
    )  # fmt: skip
    return Blocks(count, experts, rows, expert_of, used, places)
