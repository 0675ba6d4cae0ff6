"""From the packed integers that the host sends for a step to the tensors that a model's forward pass reads.

Legend: T rows of the step; "slot": a sequence's row of the block tables and of the sampling parameters; P tokens per
KV block. All integers that the host sends are int32, in one buffer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lamella_core.kernels.triton.launch import launch_options, use_pdl

RECORD_INTS = (
    12  # of `apply_updates`: slot, top_k, then temperature, top_p, min_p and the seed's halves, low word first
)
_BLOCK = 128


@triton.jit(do_not_specialize=["count", "table_stride"])
def _prepare_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,
    slots_ptr,
    positions_ptr,
    sampled_ptr,
    tables_ptr,
    ids_out_ptr,
    positions_out_ptr,
    kv_slots_out_ptr,
    count,
    table_stride,
    TOKENS_PER_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BLOCK rows per program."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < count
    token = tl.load(tokens_ptr + rows, mask, other=0)
    is_pending = token < 0
    sampled = tl.load(sampled_ptr + (-1 - token), mask & is_pending, other=0)
    token = tl.where(is_pending, tl.maximum(sampled, 0), token)  # negative: its logits could not be sampled
    slot = tl.load(slots_ptr + rows, mask, other=0).to(tl.int64)
    position = tl.load(positions_ptr + rows, mask, other=0)
    block = tl.load(tables_ptr + slot * table_stride + position // TOKENS_PER_BLOCK, mask, other=0)
    place = block.to(tl.int64) * TOKENS_PER_BLOCK + position % TOKENS_PER_BLOCK
    tl.store(ids_out_ptr + rows, token.to(tl.int64), mask)
    tl.store(positions_out_ptr + rows, position.to(tl.int64), mask)
    tl.store(kv_slots_out_ptr + rows, place, mask)


def prepare_step(
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    sampled: Tensor,
    block_tables: Tensor,
    tokens_per_block: int,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Makes the inputs of a forward pass; can be captured in a CUDA graph.

    Args:
        tokens: [T] int32; a negative one, -1 - row, stands for what the previous step wrote to ``sampled[row]``.
        slots: [T] int32.
        positions: [T] int32, each token's place in its sequence.
        sampled: int32, the tokens that the previous step sampled; negative ones (errors) are taken as token 0.
        block_tables: [slots, B] int32.
        tokens_per_block: P.
        outputs: token ids, positions, and where each row's keys and values go (block * P + offset): [T] int64 each.
    """
    count = tokens.shape[0]
    _prepare_kernel[(-(-count // _BLOCK),)](
        tokens, slots, positions, sampled, block_tables, *outputs, count, block_tables.stride(0),
        TOKENS_PER_BLOCK=tokens_per_block, BLOCK=_BLOCK, USE_PDL=use_pdl(), num_warps=4, **launch_options(),
    )  # fmt: skip


@triton.jit
def _joined(words_ptr, mask):  # type: ignore[no-untyped-def]
    """The int64 of two words, the low one first."""
    low = tl.load(words_ptr, mask, other=0).to(tl.int64) & 0xFFFFFFFF
    return low | (tl.load(words_ptr + 1, mask, other=0).to(tl.int64) << 32)


@triton.jit(do_not_specialize=["num_records", "num_entries"])
def _update_kernel(  # type: ignore[no-untyped-def]
    records_ptr,
    places_ptr,
    blocks_ptr,
    tables_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_low_ptr,
    seed_high_ptr,
    num_records,
    num_entries,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BLOCK records and BLOCK table entries per program."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_entries = index < num_entries
    place = tl.load(places_ptr + index, in_entries, other=0)
    tl.store(tables_ptr + place, tl.load(blocks_ptr + index, in_entries, other=0), in_entries)
    mask = index < num_records
    record = records_ptr + index * STRIDE
    slot = tl.load(record, mask, other=0)
    tl.store(top_k_ptr + slot, tl.load(record + 1, mask, other=0), mask)
    tl.store(temperature_ptr + slot, _joined(record + 2, mask).to(tl.float64, bitcast=True), mask)
    tl.store(top_p_ptr + slot, _joined(record + 4, mask).to(tl.float64, bitcast=True), mask)
    tl.store(min_p_ptr + slot, _joined(record + 6, mask).to(tl.float64, bitcast=True), mask)
    tl.store(seed_low_ptr + slot, _joined(record + 8, mask), mask)
    tl.store(seed_high_ptr + slot, _joined(record + 10, mask), mask)


def apply_updates(
    records: Tensor,
    places: Tensor,
    blocks: Tensor,
    block_tables: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Writes new entries of block tables, and the sampling parameters of slots that were given to a sequence.

    Args:
        records: [R, RECORD_INTS] int32; real numbers by their bits. No slot comes twice.
        places: [U] int32, flat indices of ``block_tables``, each once.
        blocks: [U] int32, what goes there.
        block_tables: [slots, B] int32, contiguous.
        parameters: of all slots: temperature float64, top_k int32, top_p and min_p float64, and the lower and upper 64
            bits of the seed int64: [slots] each.
    """
    num_records, num_entries = records.shape[0], places.shape[0]
    _update_kernel[(-(-max(num_records, num_entries, 1) // _BLOCK),)](
        records, places, blocks, block_tables,
        *parameters, num_records, num_entries,
        STRIDE=RECORD_INTS, BLOCK=_BLOCK, USE_PDL=use_pdl(), num_warps=4, **launch_options(),
    )  # fmt: skip
