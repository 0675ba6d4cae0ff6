"""CPU operations around attention: rotary embedding, KV cache write, attention over the paged cache.

Legend: T tokens, Hq query heads, Hkv key/value heads, D head size, S sequences. Callers use them through `ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamella_core.kernels.cpu import reference
from lamella_core.kernels.cpu.abi import DTYPE_CODES, check_status, kernels, pointer
from lamella_core.kernels.sparsity import BlockSparsity


def _heads_adjoin(x: Tensor) -> bool:
    """Whether the heads of one token [heads, D] lie next to each other (tokens may be strided)."""
    return x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)


def rope_inplace(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool = False) -> None:
    """Rotate the first ``rotary_dim`` values of every head in place (J. Su et al., "RoFormer", 2021).

    Args:
        q: [T, Hq, D]; may be a strided view, for example of a fused projection.
        k: [T, Hkv, D], likewise.
        cos: [T, rotary_dim / 2] float32, gathered per token.
        sin: like cos.
        rotary_dim: even, at most D.
        interleaved: pairs are (x[2i], x[2i+1]) instead of (x[i], x[i + rotary_dim/2]).

    Raises:
        ValueError: shapes do not fit together.
    """
    tokens, half = q.shape[0], rotary_dim // 2
    if not (rotary_dim % 2 == 0 and rotary_dim <= q.shape[2]):
        raise ValueError(f"rotary_dim={rotary_dim} must be even and <= {q.shape[2]}")
    if not (cos.shape == sin.shape == (tokens, half)):
        raise ValueError(f"cos is {tuple(cos.shape)}, needs ({tokens}, {half})")
    if not (k.shape[0] == tokens and k.shape[2] == q.shape[2]):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ")
    library = kernels()
    served = q.dtype == k.dtype and q.dtype in DTYPE_CODES and q.is_cpu and k.is_cpu
    if library is None or not served or not (_heads_adjoin(q) and _heads_adjoin(k)):
        reference.rope_inplace(q, k, cos, sin, rotary_dim, interleaved)
        return
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    status = library.lamella_rope(
        q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, q.shape[1], k.shape[1], q.shape[2],
        rotary_dim, q.stride(0), k.stride(0), int(interleaved), DTYPE_CODES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    check_status("rope_inplace", status)


def write_kv(k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store the keys and values of this step in the paged caches.

    Args:
        k: [T, Hkv, D]; may be a strided view.
        v: like k; None: the cache is latent, and ``v_cache`` a part of ``k_cache``.
        k_cache: [num_blocks, Hkv, block_size, D], contiguous, written in place.
        v_cache: like k_cache.
        slots: [T] int64, block * block_size + offset; negative ones are skipped.

    Raises:
        ValueError: shapes do not fit together, or a slot is past the cache.
    """
    num_blocks, kv_heads, block_size, head_dim = k_cache.shape
    written = [(k, k_cache)] if v is None else [(k, k_cache), (v, v_cache)]
    if not all(x.shape == (slots.shape[0], kv_heads, head_dim) for x, _ in written):
        raise ValueError(f"k {tuple(k.shape)} does not fit the cache")
    if any(cache.shape != k_cache.shape for _, cache in written):
        raise ValueError("k_cache and v_cache differ in shape")
    library = kernels()
    same = all(x.dtype == cache.dtype == k.dtype for x, cache in written) and slots.dtype == torch.int64
    laid = all(cache.is_contiguous() for _, cache in written) and k_cache.is_cpu
    if library is None or not same or not laid:
        if not (slots.numel() == 0 or int(slots.max()) < num_blocks * block_size):
            raise ValueError("a slot is past the cache")
        for x, cache in written:
            reference.write_rows(x, cache, slots)
        return
    k = k if _heads_adjoin(k) else k.contiguous()
    v = v if v is None or _heads_adjoin(v) else v.contiguous()
    slots = slots.contiguous()
    status = library.lamella_write_kv(
        k.data_ptr(), pointer(v), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), k.shape[0], kv_heads,
        head_dim, block_size, num_blocks, k.stride(0), 0 if v is None else v.stride(0), k.element_size(),
    )  # fmt: skip
    check_status("write_kv", status)


def _check_shapes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    prefix_lens: Tensor | None,
    extras: list[Tensor | None],
) -> None:
    """Raise `ValueError` when the shapes of `paged_attention`'s arguments do not fit together."""
    num_seqs, num_heads, head_dim = context_lens.shape[0], q.shape[1], q.shape[2]
    kv_heads, cache_dim = k_cache.shape[1], k_cache.shape[3]
    if k_cache.shape != v_cache.shape and not _is_latent(k_cache, v_cache):
        raise ValueError("k_cache and v_cache differ in shape")
    if not (head_dim == cache_dim and num_heads % kv_heads == 0):
        raise ValueError(f"q {tuple(q.shape)} does not fit {tuple(k_cache.shape)}")
    if not (block_tables.dim() == 2 and block_tables.shape[0] == num_seqs):
        raise ValueError("block_tables and context_lens differ")
    if query_start.shape != (num_seqs + 1,):
        raise ValueError(f"query_start is {tuple(query_start.shape)}, needs ({num_seqs + 1},)")
    if prefix_lens is not None and prefix_lens.shape != (num_seqs,):
        raise ValueError(f"prefix_lens is {tuple(prefix_lens.shape)}, needs ({num_seqs},)")
    if not all(extra is None or extra.shape == (num_heads,) for extra in extras):
        raise ValueError("per-head extras need shape [Hq]")


def _is_latent(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether values are the last numbers of the keys themselves."""
    skipped = k_cache.shape[3] - v_cache.shape[3]
    same = k_cache.shape[:3] == v_cache.shape[:3] and k_cache.stride() == v_cache.stride()
    return skipped >= 0 and same and k_cache[..., skipped:].data_ptr() == v_cache.data_ptr()


def _pattern(sparsity: BlockSparsity | None) -> tuple[int, ...]:
    """Returns a sparsity as the native kernel takes it."""
    if sparsity is None:
        return (0,) * 5
    s = sparsity
    return (s.block_size, s.num_local_blocks, s.vert_stride, s.first_head * s.head_step, s.head_step)


def _native_serves(q: Tensor, k_cache: Tensor, v_cache: Tensor, is_latent: bool) -> bool:
    same_dtype = q.dtype in DTYPE_CODES and q.dtype == k_cache.dtype == v_cache.dtype
    return same_dtype and q.is_cpu and k_cache.is_contiguous() and (is_latent or v_cache.is_contiguous())


def _run_native(
    library: Any,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: tuple[Tensor, Tensor, Tensor],  # block tables, query starts, context lengths
    extras: list[Tensor | None],  # prefix lengths int32, ALiBi slopes and sink logits float32
    masks: tuple[int, ...],  # window, chunked, sinks, sparsity, value size of a latent cache, rounded ALiBi
    factors: tuple[float, float],  # scale, softcap
) -> Tensor:
    q = q if _heads_adjoin(q) else q.contiguous()
    tables, starts, contexts = (x.int().contiguous() for x in lengths)
    out = q.new_empty(*q.shape[:2], v_cache.shape[3])
    blocks, kv_heads, block_size, head_dim = k_cache.shape
    status = library.lamella_paged_attention(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), tables.data_ptr(), starts.data_ptr(),
        contexts.data_ptr(), *map(pointer, extras), q.shape[0], q.shape[1], kv_heads, head_dim, q.stride(0),
        len(contexts), tables.shape[1], blocks, block_size, *masks, *factors, DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    check_status("paged_attention", status)
    return out


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
    """Causal attention of packed queries over paged caches that hold this step's keys and values already.

    Query i of sequence s sits at position context_lens[s] - q_len + i and attends keys 0..position; with a window,
    those nearer than ``sliding_window`` and the first ``num_sinks`` (Xiao et al. 2023, "attention sinks").

    Args:
        q: [T, Hq, D]; may be a strided view.
        k_cache: [num_blocks, Hkv, block_size, D].
        v_cache: like k_cache, or of a latent cache its view of the last Dv numbers: ``k_cache[..., -Dv:]``.
        block_tables: [S, max_blocks] int32; a negative id is an evicted block, whose keys are skipped.
        query_start: [S + 1] int32, where each sequence's queries start in q.
        context_lens: [S] int32, keys of each sequence including this step's.
        scale: multiplies q.k.
        sliding_window: keys a query sees, its own included; 0 for all.
        num_sinks: first keys that stay visible outside the window.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        alibi_slopes: [Hq]; adds slope * (key - query position) to the scores; see ``rounds_alibi``.
        sink_logits: [Hq]; one more softmax column per head that has no value.
        is_chunked: keys are cut into chunks of ``sliding_window``, and a query sees its own chunk instead.
        prefix_lens: [S] int32, at most the context's: first keys, which queries among them all see.
        sparsity: what heads see of all this.
        rounds_alibi: adds scale * bfloat16(slope * bfloat16(key position)) instead.

    Returns:
        [T, Hq, D] in q's dtype, [T, Hq, Dv] over a latent cache; rows that see no key are zero.

    Raises:
        ValueError: shapes do not fit together, or lengths and block ids contradict them.
    """
    extras = [None if extra is None else extra.float().contiguous() for extra in (alibi_slopes, sink_logits)]
    _check_shapes(q, k_cache, v_cache, block_tables, query_start, context_lens, prefix_lens, extras)
    library, is_latent = kernels(), _is_latent(k_cache, v_cache)
    if library is None or not _native_serves(q, k_cache, v_cache, is_latent):
        return reference.paged_attention(
            q, k_cache, v_cache, block_tables, query_start, context_lens, scale, sliding_window, num_sinks, softcap,
            alibi_slopes, sink_logits, is_chunked, prefix_lens, sparsity, rounds_alibi,
        )  # fmt: skip
    extras = [None if prefix_lens is None else prefix_lens.int().contiguous(), *extras]
    value_dim = v_cache.shape[3] if is_latent else 0
    masks = (sliding_window, is_chunked, num_sinks, *_pattern(sparsity), value_dim, rounds_alibi)
    lengths = (block_tables, query_start, context_lens)
    return _run_native(library, q, k_cache, v_cache, lengths, extras, masks, (scale, softcap))
