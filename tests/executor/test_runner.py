"""ModelRunner and its parts: packing, windows, block copies, and the same logits however the work is cut."""

from __future__ import annotations

import pytest
import torch
from tests.support.executors import LLAMA, hf_logprobs, prompt, tiny_model

from lamella_core.context import AttentionSpec
from lamella_executor.attention.paged_cpu import LayerWindow, PagedKvCache, layer_windows, make_batch
from lamella_executor.runner.model_runner import ModelRunner
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import EVICTED_BLOCK, RequestState, Sequence

BLOCK = 4


def item(ids: list[int], blocks: list[int], start: int, count: int, num_logits: int) -> ScheduledSequence:
    sequence = Sequence(0, ids, len(ids), num_computed_tokens=start, blocks=blocks)
    request = RequestState(1, SamplingParams(), 0, None, 1, [sequence], 0.0)
    return ScheduledSequence(request, sequence, start, count, num_logits)


def test_packing():
    plan = StepPlan(
        [
            item(list(range(10, 20)), [3, 1, 7], start=5, count=4, num_logits=0),
            item([1, 2, 3], [2], start=2, count=1, num_logits=1),
            item([4, 5, 6, 7, 8, 9], [EVICTED_BLOCK, 0], start=4, count=2, num_logits=2),
        ]
    )
    batch = make_batch(plan, BLOCK)
    assert batch.input_ids.tolist() == [15, 16, 17, 18, 3, 8, 9]
    assert batch.positions.tolist() == [5, 6, 7, 8, 2, 4, 5]
    assert batch.slots.tolist() == [5, 6, 7, 28, 10, 0, 1]
    assert batch.query_start.tolist() == [0, 4, 5, 7]
    assert batch.context_lens.tolist() == [9, 3, 6]
    assert batch.block_tables.tolist() == [[3, 1, 7], [2, -1, -1], [-1, 0, -1]]
    assert batch.logit_rows.tolist() == [4, 5, 6]
    assert make_batch(StepPlan([item([1, 2, 3], [2], 2, 1, 1)]), BLOCK).logit_rows is None


def spec(layer: int, window: int | None = None) -> AttentionSpec:
    return AttentionSpec(layer, 2, 1, 8, 1.0, sliding_window=window)


def test_windows():
    specs = [spec(0), spec(1, 6), spec(2), spec(3, 20)]
    assert layer_windows(specs, None, 0) == {0: LayerWindow(), 1: LayerWindow(6), 2: LayerWindow(), 3: LayerWindow(20)}
    cycled = layer_windows(specs, (10, 4), 2)
    assert [cycled[i] for i in range(4)] == [LayerWindow(n, 2) for n in (10, 4, 10, 4)]
    second_stage = layer_windows(specs[1:], (10, 4), 2)
    assert second_stage == {i: cycled[i] for i in (1, 2, 3)}


def test_the_cache_is_aligned_zero_and_copies_blocks_in_order():
    cache = PagedKvCache([spec(0), spec(5)], num_blocks=4, tokens_per_block=BLOCK, dtype=torch.bfloat16)
    for layer in (0, 5):
        for tensor in cache.layer(layer):
            assert tensor.shape == (4, 1, BLOCK, 8) and tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0 and not tensor.any()
            tensor[0] = layer + 1
    cache.copy_blocks([(0, 2), (2, 3)])
    assert all((cache.layer(5)[i][3] == 6).all() for i in (0, 1))
    assert not cache.layer(0)[0][1].any()


@pytest.fixture
def runner():
    model = tiny_model(*LLAMA)
    specs = model.attention_specs()
    cache = PagedKvCache(specs, num_blocks=16, tokens_per_block=BLOCK, dtype=torch.float32)
    return ModelRunner(model, cache, layer_windows(specs, None, 0))


def test_logits_are_those_of_transformers_however_cut(runner):
    ids, want = prompt(14), hf_logprobs(prompt(14))
    whole = runner.run(StepPlan([item(ids, [0, 1, 2, 3], 0, 14, 14)]))
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole.log_softmax(-1), want, atol=1e-4, rtol=0)
    rows, other = [], prompt(7, seed=1)
    for start, count in ((0, 5), (5, 1), (6, 6), (12, 2)):
        neighbour = item(other, [12, 13], 0, 7, 1)
        plan = StepPlan([neighbour, item(ids, [9, 5, 8, 4], start, count, count)])
        rows.append(runner.run(plan)[1:])
    torch.testing.assert_close(torch.cat(rows).log_softmax(-1), want, atol=1e-4, rtol=0)


def test_copies_happen_before_the_forward(runner):
    ids = prompt(8)
    runner.run(StepPlan([item(ids, [0, 1], 0, 7, 0)]))
    plain = runner.run(StepPlan([item(ids, [0, 1], 7, 1, 1)]))
    copied = runner.run(StepPlan([item(ids, [0, 6], 7, 1, 1)], block_copies=[(1, 6)]))
    assert torch.equal(plain, copied)


def test_no_logits_wanted(runner):
    assert runner.run(StepPlan([item(prompt(5), [0, 1], 0, 4, 0)])).shape == (0, 131)
