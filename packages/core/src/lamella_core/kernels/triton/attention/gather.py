"""Keys and values of sequences out of a paged cache, one after another: for kernels that read no block tables.

Shape legend: see `common`; C keys of all sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lamella_core.kernels.triton.attention.common import (
    UNALIGNED,
    Layout,
    head_cache,
    key_offsets,
    layout_of,
    load_pages,
    storage,
    widen_float8,
)

_TILE = 32  # tokens per program
_LENGTHS = 128  # that are added at a time


# fmt: off
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _gather_keys_kernel(  # type: ignore[no-untyped-def]
    out_k_ptr, out_v_ptr,  # [C, Hkv, D]
    k_ptr, v_ptr,  # [N, Hkv, P, D]
    tables_ptr,  # [*, B] int32
    rows_ptr, lengths_ptr,  # [S] int32
    table_stride,
    L: tl.constexpr,
    TILE: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """One tile of one sequence's keys and values of one head."""
    tile, seq, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + seq)
    if tile * TILE >= length:
        return
    first = 0  # of the sequence's keys
    for base in range(0, seq, LENGTHS):
        before = base + tl.arange(0, LENGTHS)
        first += tl.sum(tl.load(lengths_ptr + before, before < seq, other=0), axis=0)
    table_ptr = tables_ptr + tl.load(rows_ptr + seq).to(tl.int64) * table_stride
    pages = load_pages(table_ptr, tile, (length - 1) // L.page, L, TILE)
    keys, cols = tile * TILE + tl.arange(0, TILE), tl.arange(0, L.padded_dim)[None, :]
    mask = (keys < length)[:, None] & (cols < L.head_dim)
    offsets = key_offsets(pages, tile, L, TILE, 1) + cols
    k = tl.load(head_cache(k_ptr, head, 1, L) + offsets, mask, other=0)
    v = tl.load(head_cache(v_ptr, head, 1, L) + offsets, mask, other=0)
    if L.float8:
        k, v = widen_float8(k, L), widen_float8(v, L)
    at = ((first + keys).to(tl.int64) * (L.heads // L.group) + head)[:, None] * L.head_dim + cols
    tl.store(out_k_ptr + at, k.to(out_k_ptr.dtype.element_ty), mask)
    tl.store(out_v_ptr + at, v.to(out_v_ptr.dtype.element_ty), mask)
# fmt: on


def gather_keys(
    out: tuple[Tensor, Tensor],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    table_rows: Tensor,
    context_lens: Tensor,
    *,
    max_context_len: int,
) -> None:
    """Copies the keys and values of sequences to ``out``; those of a float8 cache widened, not scaled.

    * out: two contiguous tensors [at least C, Hkv, D] of q's dtype, bfloat16 or float16.
    * q [T, Hq, D]: only its dtype and shape matter.
    * context_lens [S] int32: keys of each sequence; their sum is C.
    * max_context_len: of any of them, or more.

    Other arguments: see `common`.

    Raises:
        ConfigError: the tensors do not fit each other or the kernel.
    """
    layout: Layout = layout_of(q, k_cache, v_cache, 1.0, 0, 0, 0.0)
    grid = (-(-max_context_len // _TILE), table_rows.shape[0], k_cache.shape[1])
    _gather_keys_kernel[grid](
        *out, storage(k_cache), storage(v_cache), block_tables, table_rows, context_lens, block_tables.stride(0),
        L=layout, TILE=_TILE, LENGTHS=_LENGTHS,
    )  # fmt: skip
