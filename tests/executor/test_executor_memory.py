"""The KV cache's size: which knob decides, and what is said when it does not fit."""

from __future__ import annotations

import pytest
import torch

from lamella_core.context import AttentionSpec
from lamella_core.errors import OutOfMemoryError
from lamella_executor import memory
from lamella_executor.config import KvCacheConfig
from lamella_executor.memory import KvCacheDemand, plan_kv_cache

SPECS = [AttentionSpec(i, 8, 2, 64, 0.125) for i in range(3)]
TOKEN_BYTES = 3 * 2 * 2 * 64 * 2  # layers, keys and values, heads, head size, bfloat16
DEMAND = KvCacheDemand(max_sequences=4, max_resident_tokens=100)


def plan(free: int, **config) -> memory.KvCachePlan:
    return plan_kv_cache(SPECS, torch.bfloat16, 16, KvCacheConfig(**config), DEMAND, free_bytes=free)


def test_the_default_is_what_the_limits_can_use():
    made = plan(1 << 30)
    assert (made.num_blocks, made.block_bytes) == (4 * 7, 16 * TOKEN_BYTES)
    assert (made.num_tokens, made.num_bytes) == (448, 448 * TOKEN_BYTES)


def test_the_default_takes_half_of_little_memory():
    assert plan(400 * TOKEN_BYTES).num_tokens == 192


def test_the_smallest_limit_wins():
    assert plan(1 << 30, max_tokens=1000).num_tokens == 1008
    assert plan(1 << 30, max_tokens=1000, host_memory_bytes=50 * TOKEN_BYTES).num_tokens == 48
    assert plan(1 << 30, max_tokens=10, host_memory_bytes=50 * TOKEN_BYTES).num_tokens == 16


def test_what_does_not_fit_says_numbers_and_knob():
    with pytest.raises(OutOfMemoryError, match="max_tokens is 1000.*At most 368 tokens fit: lower max_tokens"):
        plan(400 * TOKEN_BYTES, max_tokens=1000)
    with pytest.raises(OutOfMemoryError, match="50% of 0 MiB free memory, less than one KV block: 16 tokens take"):
        plan(20 * TOKEN_BYTES)


def test_models_without_attention_need_no_cache():
    assert plan_kv_cache([], torch.float32, 16, KvCacheConfig(), DEMAND, free_bytes=0).num_bytes == 0
