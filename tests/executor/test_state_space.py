"""Sequences with recurrent states through the executor: batched, chunked, paused, forked, all as if alone."""

from __future__ import annotations

import pytest
import torch
from tests.support.executors import bench, greedy, prompt, tiny_model
from tests.support.reference_context import greedy as reference_greedy

from lamella_executor import CapacitySchedulerPolicy, KvCacheConfig, SamplingParams, SchedulerConfig

MAMBA = ("MambaForCausalLM", "tied")
MAMBA2 = ("Mamba2ForCausalLM", "grouped")
NEMOTRON_H = ("NemotronHForCausalLM", "all_kinds")
BAMBA = ("BambaForCausalLM", "attention_last")
QWEN3_NEXT = ("Qwen3NextForCausalLM", "attention_last")
MODELS = pytest.mark.parametrize("model", [MAMBA, MAMBA2, NEMOTRON_H, BAMBA, QWEN3_NEXT], ids=lambda model: model[0])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def expected(model, prompts, num_tokens):
    return reference_greedy(tiny_model(*model), prompts, num_tokens)


def outputs(results):
    return [result.outputs[0].token_ids for result in results]


@MODELS
def test_batched_and_chunked_equal_alone(model):
    prompts = [prompt(length, seed) for seed, length in enumerate((1, 2, 23, 9, 40, 3, 17))]
    with bench(model, max_batch_size=3, max_num_tokens=7, max_beam_width=1) as it:
        results = it.executor.generate(prompts, greedy(8))
        assert it.idle_blocks() == (0, 0)
        assert it.kv.stats().num_queried_tokens > 0 == it.kv.stats().num_reused_tokens
    assert outputs(results) == expected(model, prompts, 8)


@MODELS
def test_slots_are_used_again_after_an_abort(model):
    """What a cancelled sequence left in its slot is not seen by the next one."""
    with bench(model, max_batch_size=1) as it:
        for seed in range(3):
            with it.held():
                running = it.executor.generate_async(prompt(9, seed), greedy(40))
                running.abort()
            assert outputs([it.executor.generate(prompt(5, seed), greedy(6))]) == expected(model, [prompt(5, seed)], 6)
        assert it.idle_blocks() == (0, 0)


@pytest.mark.parametrize("model", [NEMOTRON_H, BAMBA, QWEN3_NEXT], ids=lambda model: model[0])
def test_paused_requests_compute_their_states_again(model):
    prompts = [prompt(11, seed) for seed in range(4)]
    scheduler = SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION)
    with bench(model, KvCacheConfig(max_tokens=64), scheduler, max_num_tokens=16) as it:
        results = it.executor.generate(prompts, greedy(20))
        assert it.idle_blocks() == (0, 0)
        assert sum(result.metrics.num_pauses for result in results) > 0
    assert outputs(results) == expected(model, prompts, 20)


@MODELS
def test_samples_fork_their_states(model):
    """The log-probabilities of each sample's tokens are those of a request that has them as its prompt."""
    params = {"max_tokens": 10, "temperature": 1.5, "seed": 3, "ignore_eos": True}
    with bench(model) as it:
        together = it.executor.generate(prompt(13), SamplingParams(n=4, logprobs=0, **params))
        paths = [output.token_ids for output in together.outputs]
        assert len({tuple(path) for path in paths}) == 4
        for output in together.outputs:
            forced = it.executor.generate(
                prompt(13) + output.token_ids, SamplingParams(max_tokens=1, prompt_logprobs=0)
            )
            scored = [forced.prompt_logprobs[13 + i][token].logprob for i, token in enumerate(output.token_ids)]
            drawn = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
            assert scored == drawn
        assert it.idle_blocks() == (0, 0)


@MODELS
def test_beams_fork_and_drop_their_states(model):
    """Beams come and go all the time; the score of each that is left is that of its tokens computed alone."""
    with bench(model, max_batch_size=2, max_beam_width=3) as it:
        params = SamplingParams(max_tokens=9, use_beam_search=True, best_of=3, n=3, ignore_eos=True)
        results = it.executor.generate([prompt(7, seed) for seed in range(3)], params)
        for seed, result in enumerate(results):
            assert len({tuple(output.token_ids) for output in result.outputs}) == 3
            for output in result.outputs:
                ids = prompt(7, seed) + output.token_ids
                forced = it.executor.generate(ids, SamplingParams(max_tokens=1, prompt_logprobs=0))
                scored = sum(forced.prompt_logprobs[7 + i][t].logprob for i, t in enumerate(output.token_ids))
                assert output.cumulative_logprob == pytest.approx(scored, abs=1e-4)
        assert it.idle_blocks() == (0, 0)


def test_paused_samples_go_on_alone():
    """After a pause nobody's states are shared: every sample computes the prompt again."""
    params = SamplingParams(max_tokens=16, temperature=1.5, n=2, ignore_eos=True, seed=5)
    prompts = [prompt(12, seed) for seed in range(4)]
    with bench(NEMOTRON_H) as it:
        alone = [[o.token_ids for o in it.executor.generate(ids, params).outputs] for ids in prompts]
    scheduler = SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION)
    with bench(NEMOTRON_H, KvCacheConfig(max_tokens=96), scheduler) as it:
        results = it.executor.generate(prompts, params)
        assert sum(result.metrics.num_pauses for result in results) > 0
        assert it.idle_blocks() == (0, 0)
    assert [[o.token_ids for o in result.outputs] for result in results] == alone


def test_the_slots_bound_what_runs():
    with bench(MAMBA, max_batch_size=2, max_beam_width=1) as it:
        assert it.kv.num_state_slots == 2
        results = it.executor.generate([prompt(4, seed) for seed in range(5)], greedy(5))
        assert it.idle_blocks() == (0, 0)
    assert outputs(results) == expected(MAMBA, [prompt(4, seed) for seed in range(5)], 5)
