"""Random steps over a paged cache, for tests of attention backends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lamella_core.context import AttentionSpec
from lamella_core.kernels.sparsity import BlockSparsity
from lamella_executor.attention.backend import AttentionStep, HostLengths, LayerCall
from lamella_executor.attention.paged_cpu import LayerWindow


def make_layer(
    device: str,
    *,
    num_blocks: int = 64,
    layer_idx: int = 0,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    window: LayerWindow | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sparsity: BlockSparsity | None = None,
    rounds_alibi: bool = False,
    **extra: torch.Tensor | None,
) -> LayerCall:
    """A layer with random keys and values in its cache."""
    window = window or LayerWindow()
    spec = AttentionSpec(
        layer_idx, num_heads, num_kv_heads, head_dim, scale or head_dim**-0.5, window.length or None,
        softcap=softcap, sparsity=sparsity, rounds_alibi=rounds_alibi,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(layer_idx + 1)
    shape = (num_blocks + 1, num_kv_heads, page_size, head_dim)
    caches = [torch.randn(shape, generator=generator).to(cache_dtype or dtype).to(device) for _ in range(2)]
    given = {"alibi_slopes": None, "sink_logits": None, "kv_scales": None, "out_scale": None} | extra
    return LayerCall(spec, window, *caches, **given)


def make_step(
    device: str,
    contexts: Sequence[int],
    queries: Sequence[int],
    *,
    page_size: int = 16,
    num_blocks: int = 64,
    is_captured: bool = False,
    prefixes: Sequence[int] | None = None,
) -> AttentionStep:
    """A step of sequences with these lengths, whose first ones have one query each; blocks and rows are shuffled.

    With ``prefixes`` the first so many tokens of each see each other. The table is wider than it needs to be, and what
    is behind a sequence's last block belongs to nobody: -1.
    """
    rng = np.random.default_rng(5)
    context, query = np.array(contexts, np.int32), np.array(queries, np.int32)
    counts = -(-context // page_size)
    assert counts.sum() <= num_blocks
    rows = rng.permutation(len(contexts) + 3)[: len(contexts)].astype(np.int32)
    tables = np.full((len(contexts) + 3, int(counts.max()) + 2), -1, np.int32)
    free = rng.permutation(num_blocks).astype(np.int32)
    for row, count in zip(rows, counts):
        tables[row, :count], free = free[:count], free[count:]
    num_decode = next((i for i, length in enumerate(queries) if length > 1), len(queries))
    starts = np.concatenate([[0], np.cumsum(query[num_decode:])]).astype(np.int32)
    tensors = [torch.from_numpy(array).to(device) for array in (tables, rows, context, starts)]
    prefix = None if prefixes is None else np.array(prefixes, np.int32)
    return AttentionStep(
        *tensors,
        num_decode=num_decode,
        num_tokens=int(query.sum()),
        max_query_len=int(query.max()),
        max_context_len=int(context.max()),
        host=None if is_captured else HostLengths(context, query, prefix),
        prefix_lens=None if prefix is None else torch.from_numpy(prefix[num_decode:]).to(device),
    )


def make_queries(step: AttentionStep, layer: LayerCall, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[T, Hq, D], a strided part of a fused projection as a model's queries are."""
    spec = layer.spec
    heads = spec.num_heads + 2 * spec.num_kv_heads
    generator = torch.Generator().manual_seed(11)
    fused = torch.randn(step.num_tokens, heads, spec.head_dim, generator=generator).to(dtype)
    return fused.to(layer.k_cache.device)[:, : spec.num_heads]
