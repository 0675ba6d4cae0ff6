"""Calls of the attention kernels in the variants that a Llama and a Gemma need, for `tests.support.triton_compiler`."""

from __future__ import annotations

import torch

from lamella_core.kernels.sparsity import BlockSparsity
from lamella_core.kernels.triton.attention import (
    common,
    decode,
    decode_plan,
    gather,
    mla,
    mla_plan,
    prefill,
    prefill_plan,
)

BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn
PAGE = 32
SPARSITY = BlockSparsity(64, 16, 8, 1)


def calls() -> None:
    for module in (common, decode, decode_plan, mla, mla_plan):
        module.num_processors = lambda device: 132
    for module in (common, prefill_plan, decode_plan, mla_plan):
        module.shared_memory = lambda device: 227 << 10
    for cache in (BF16, FLOAT8):
        decoded(cache, 1, 8192)
        prompts(cache, 2048, 8192)
    decoded(FLOAT8, 1, 256)  # one program at most per processor: the longest tiles
    decoded(FLOAT8, 16, 8192)
    whole(8192)
    whole(128, sliding_window=64, softcap=30.0, out_scale=torch.ones(()))
    whole(128, prefix_lens=torch.ones(1, dtype=torch.int32), sparsity=SPARSITY)
    alibi = {"alibi_slopes": torch.ones(32), "rounds_alibi": True}
    decoded(BF16, 64, 8192, sparsity=SPARSITY)
    decoded(BF16, 1024, 256, **alibi)
    prompts(BF16, 128, 128, **alibi)
    prompts(BF16, 128, 128, prefix_lens=torch.ones(1, dtype=torch.int32))
    for cache in (FLOAT8, BF16):
        gathered(cache)
    for cache in (BF16, FLOAT8):
        latent(cache, 16 if cache is BF16 else 128)


def _layer(cache: torch.dtype, tokens: int) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(tokens, 32, 128, dtype=BF16)
    k, v = (torch.zeros(3, 8, PAGE, 128, dtype=torch.uint8 if cache.itemsize == 1 else cache) for _ in "kv")
    return q, k.view(cache), v.view(cache), torch.zeros(4, 8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)


def _scales(cache: torch.dtype) -> torch.Tensor | None:
    return torch.ones(2) if cache.itemsize == 1 else None


def decoded(cache: torch.dtype, count: int, longest: int, **options: object) -> None:
    q, k, v, tables, rows = _layer(cache, count)
    lengths = torch.ones(count, dtype=torch.int32)
    decode.decode_attention(
        q, k, v, tables, rows.expand(count), lengths, scale=1.0, max_context_len=longest, kv_scales=_scales(cache),
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


def prompts(cache: torch.dtype, count: int, keys: int, **options: object) -> None:
    q, k, v, tables, rows = _layer(cache, count)
    starts = torch.tensor([0, count], dtype=torch.int32)
    prefill.prefill_attention(
        q, k, v, tables, rows, starts, rows, scale=1.0, max_query_len=count, max_context_len=keys,
        kv_scales=_scales(cache), **options,  # type: ignore[arg-type]
    )  # fmt: skip


def whole(count: int, **options: object) -> None:
    q, k, v = torch.zeros(count, 48, 128, dtype=BF16).split([32, 8, 8], dim=1)
    starts = torch.tensor([0, count], dtype=torch.int32)
    prefill.ragged_attention(q, k, v, starts, scale=1.0, max_query_len=count, **options)  # type: ignore[arg-type]


def gathered(cache: torch.dtype) -> None:
    q, k, v, tables, rows = _layer(cache, 1)
    out = (torch.zeros(64, 8, 128, dtype=BF16), torch.zeros(64, 8, 128, dtype=BF16))
    gather.gather_keys(out, q, k, v, tables, rows, rows, max_context_len=64)


def latent(cache: torch.dtype, heads: int) -> None:
    """DeepSeek's sizes: a step that decodes in parts, and a chunk."""
    stored = torch.zeros(3, 1, PAGE, 576, dtype=torch.uint8 if cache.itemsize == 1 else cache).view(cache)
    tables, rows = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    q, starts = torch.zeros(64, heads, 576, dtype=BF16), torch.tensor([0, 64], dtype=torch.int32)
    inputs = (stored, 512, tables, rows)
    mla.latent_decode(q[:1], *inputs, rows, scale=1.0, max_context_len=8192, kv_scales=_scales(cache))
    mla.latent_prefill(q, *inputs, starts, rows, scale=1.0, max_query_len=64, kv_scales=_scales(cache))
