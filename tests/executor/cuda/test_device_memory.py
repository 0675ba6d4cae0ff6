"""The plan of a GPU's memory: a function of numbers."""

from __future__ import annotations

import pytest
from tests.support.executors import tiny_model

from lamella_core.errors import ConfigError, OutOfMemoryError
from lamella_executor.config import KvCacheConfig
from lamella_executor.memory import KvCacheDemand
from lamella_executor.runner.cuda.graphs import capture_sizes
from lamella_executor.runner.cuda.memory import (
    REUSE_FACTOR,
    DeviceMemory,
    DeviceNeeds,
    activation_bytes,
    graph_bytes,
    logits_bytes,
    plan_device_memory,
)

GIB = 1 << 30
NEEDS = DeviceNeeds(weights=16 * GIB, workspace=2 * GIB, graphs=GIB, state=GIB)
DEVICE = DeviceMemory(total=80 * GIB, free=62 * GIB)  # 2 GiB are others'
BLOCK = 4 << 20
MANY = KvCacheDemand(max_sequences=2048, max_resident_tokens=8192)


def plan(demand: KvCacheDemand = MANY, needs: DeviceNeeds = NEEDS, **config):
    return plan_device_memory(
        needs, DEVICE, KvCacheConfig(**config), demand, block_bytes=BLOCK, tokens_per_block=32
    )  # fmt: skip


def test_the_fraction_is_of_what_the_largest_step_leaves():
    made = plan()
    assert made.kv.num_blocks == int(58 * GIB * 0.9) // BLOCK - 1  # one is scratch
    assert plan(free_gpu_memory_fraction=0.5).kv.num_blocks == 29 * GIB // BLOCK - 1


def test_each_bound_may_make_it_smaller():
    assert plan(max_tokens=1000).kv.num_blocks == 32
    assert plan(max_gpu_total_bytes=GIB).kv.num_blocks == GIB // BLOCK - 1
    assert plan(gpu_memory_utilization=0.5, free_gpu_memory_fraction=1.0).kv.num_blocks == 20 * GIB // BLOCK - 1
    assert plan(gpu_memory_utilization=1.0) == plan()  # others hold memory: what is free bounds
    assert plan(max_tokens=1 << 40) == plan()


def test_no_more_than_can_be_used():
    few = KvCacheDemand(max_sequences=3, max_resident_tokens=100)
    assert plan(few, enable_block_reuse=False).kv.num_blocks == 3 * 4
    assert plan(few).kv.num_blocks == REUSE_FACTOR * 3 * 4


def test_what_does_not_fit_says_numbers_and_knobs():
    large = DeviceNeeds(weights=16 * GIB, workspace=61 * GIB, graphs=GIB, state=0)
    with pytest.raises(OutOfMemoryError, match="63488 MiB are free beside 16384 MiB of weights; the largest step takes "
                       "62464, .*free_gpu_memory_fraction, max_gpu_total_bytes or gpu_memory_utilization"):  # fmt: skip
        plan(needs=large)
    with pytest.raises(OutOfMemoryError, match="gpu_memory_utilization 0.25 of 81920 MiB, "):
        plan(gpu_memory_utilization=0.25)
    with pytest.raises(OutOfMemoryError, match="may use 4.0 MiB of the rest, where two blocks of 32 tokens take 8.0"):
        plan(max_gpu_total_bytes=BLOCK)


def test_the_table_adds_up():
    made = plan()
    sizes = {line[:40].strip(): float(line.split()[-2]) for line in made.table().splitlines()}
    assert sizes["weights"] == 16384 and sizes["device"] == 81920 and sizes["others and the driver"] == 2048
    total = sum(size for name, size in sizes.items() if name != "device")
    assert total == pytest.approx(81920, abs=len(sizes))


def test_models_without_attention():
    made = plan_device_memory(NEEDS, DEVICE, KvCacheConfig(), MANY, block_bytes=0, tokens_per_block=32)
    assert made.kv.num_bytes == 0


def test_estimates_grow_with_what_they_are_of():
    config = tiny_model().config
    assert activation_bytes(config, 64) == 8 * activation_bytes(config, 8) > 0
    assert logits_bytes(config, 3) == 3 * 131 * 4
    assert graph_bytes(config, []) == 0
    assert graph_bytes(config, [1, 2, 4, 64]) > graph_bytes(config, [1, 2]) > 0


@pytest.mark.parametrize("value", [0.0, 1.5, "half", True])
def test_the_total_budget_is_a_fraction(value):
    with pytest.raises(ConfigError, match="gpu_memory_utilization is"):
        KvCacheConfig(gpu_memory_utilization=value)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 31, 100, 256, 300, 1000, 1024, 2048, 4000])
def test_capture_sizes(most):
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 60
    for rows in range(1, most + 1):
        padded = next(size for size in sizes if size >= rows)
        most_padding = rows if rows <= 8 else 8 if rows <= 32 else 16 if rows <= 256 else rows / 8
        assert padded - rows < most_padding
