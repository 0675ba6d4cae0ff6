"""Prompts that are read in both directions, through the executor: batched, paused, forked, in stages, as if alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.device_steps import BLOCK, NUM_BLOCKS, pretend_captured, runner_setup
from tests.support.executors import bench, greedy, prompt, tiny_model
from tests.support.rank_threads import staged
from tests.support.reference_context import greedy as reference_greedy

from lamella_core.errors import ConfigError, RequestError
from lamella_core.mapping import Mapping
from lamella_core.prefix import Prefix, PrefixRule
from lamella_executor import (
    CapacitySchedulerPolicy,
    GenerationExecutor,
    KvCacheConfig,
    SamplingParams,
    SchedulerConfig,
)
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.loop import EngineLoop
from lamella_executor.runner.cuda import start
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.stats import StatsBuffer

CHATGLM = ("ChatGLM1Model", "chat")  # answers start with 58 and stand for the first 78, else the first 86
GLM = ("GLMModel", "last_blank")  # with 125, and for the first of 113, 10 and 99
START, GMASK = 58, 78
MODELS = pytest.mark.parametrize("model", [CHATGLM, GLM], ids=lambda model: model[0])
PAUSING = SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION)
NO_CHUNKS = SchedulerConfig(enable_chunked_prefill=False)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def marked(length: int, seed: int = 0) -> list[int]:
    """A prompt as chats have it: text, the blank, the answer's start."""
    return [*(token for token in prompt(length - 2, seed) if token not in (START, GMASK)), GMASK, START]


PROMPTS = [prompt(length, seed) for seed, length in enumerate((1, 2, 23, 9, 40, 3))] + [marked(12), marked(30, 1)]


def expected(model: tuple[str, str], prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    return reference_greedy(tiny_model(*model), prompts, num_tokens)


def outputs(results: list[Any]) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in results]


def test_a_prompt_says_what_its_prefix_is():
    rule = PrefixRule(9, ((7,), (5, 6)))
    assert rule.of([1, 7, 2, 9, 3, 9]) == Prefix(3, 1)
    assert rule.of([6, 1, 5, 7, 9]) == Prefix(4, 3)  # the first group of which there is any
    assert rule.of([1, 6, 5, 2]) == Prefix(4, 1)
    assert rule.of([1, 2, 3]) == Prefix(3, 2)
    assert rule.of([9]) == Prefix(0, 0)


@MODELS
@pytest.mark.parametrize("scheduler", [None, NO_CHUNKS], ids=["chunked", "whole"])
def test_batched_equals_alone(model, scheduler):
    """Prompts wait until a step has room for them, and nothing is reused, however alike they are."""
    prompts = [*PROMPTS, PROMPTS[4], [*PROMPTS[4][:30], 5, 6]]
    with bench(model, None, scheduler, max_batch_size=4, max_num_tokens=41, max_beam_width=1) as it:
        results = it.executor.generate(prompts, greedy(8))
        assert it.idle_blocks() == (0, 0)
        assert it.kv.stats().num_queried_tokens > 0 == it.kv.stats().num_reused_tokens
    assert outputs(results) == expected(model, prompts, 8)


@MODELS
def test_paused_requests_read_their_prompt_as_before(model):
    """Prompt and generated tokens are more than a step: the prompt comes first and whole, the rest in chunks."""
    prompts = [prompt(11, seed) for seed in range(4)]
    with bench(model, KvCacheConfig(max_tokens=64), PAUSING, max_num_tokens=16) as it:
        results = it.executor.generate(prompts, greedy(20))
        assert it.idle_blocks() == (0, 0)
        assert sum(result.metrics.num_pauses for result in results) > 0
    assert outputs(results) == expected(model, prompts, 20)


def test_what_follows_the_prefix_may_be_chunked():
    text = [*marked(10), *prompt(20, 3)]
    with bench(CHATGLM, max_num_tokens=11) as it:
        assert outputs([it.executor.generate(text, greedy(5))]) == expected(CHATGLM, [text], 5)
        for refused in (prompt(12), [*prompt(12), START]):
            with pytest.raises(RequestError, match="12 tokens that see each other.*at most 11.*max_num_tokens"):
                it.executor.generate(refused, greedy(5))


def test_samples_and_beams_share_a_prefix():
    """The log-probabilities of their tokens are those of a request that has them after the answer's start."""
    ids = marked(13)
    shared = {"max_tokens": 8, "ignore_eos": True, "logprobs": 0}
    with bench(CHATGLM, max_num_tokens=32) as it:
        sampled = it.executor.generate(ids, SamplingParams(n=4, temperature=1.5, seed=3, **shared))
        beams = it.executor.generate(ids, SamplingParams(use_beam_search=True, best_of=3, n=3, **shared))
        for output in [*sampled.outputs, *beams.outputs]:
            forced = it.executor.generate(ids + output.token_ids, SamplingParams(max_tokens=1, prompt_logprobs=0))
            scored = [forced.prompt_logprobs[len(ids) + i][t].logprob for i, t in enumerate(output.token_ids)]
            assert output.cumulative_logprob == pytest.approx(sum(scored), abs=1e-4)
        assert len({tuple(output.token_ids) for output in sampled.outputs}) == 4
        assert it.idle_blocks() == (0, 0)


@MODELS
def test_paused_samples_go_on(model):
    params = SamplingParams(max_tokens=16, temperature=1.5, n=2, ignore_eos=True, seed=5)
    prompts = [prompt(12, seed) for seed in range(4)]
    with bench(model) as it:
        alone = [[o.token_ids for o in it.executor.generate(ids, params).outputs] for ids in prompts]
    with bench(model, KvCacheConfig(max_tokens=96), PAUSING, max_num_tokens=16) as it:
        results = it.executor.generate(prompts, params)
        assert sum(result.metrics.num_pauses for result in results) > 0
        assert it.idle_blocks() == (0, 0)
    assert [[o.token_ids for o in result.outputs] for result in results] == alone


@MODELS
@pytest.mark.parametrize("mapping", [Mapping(world_size=2, pp_size=2), Mapping(world_size=4, tp_size=2, pp_size=2)],
                         ids=["pp2", "tp2pp2"])  # fmt: skip
def test_stages_know_the_prefixes(model, mapping):
    with staged(mapping, model, max_num_tokens=48) as (it, _):
        assert outputs(it.executor.generate(PROMPTS, greedy(6))) == expected(model, PROMPTS, 6)
        assert it.idle_blocks() == (0, 0)


def test_windows_are_refused():
    with (
        pytest.raises(ConfigError, match="max_attention_window.*both directions"),
        bench(CHATGLM, KvCacheConfig(max_tokens=64, max_attention_window=8)),
    ):
        pass


@MODELS
@pytest.mark.parametrize("is_padded", [False, True])
def test_on_a_device(model, is_padded):
    """One step ahead, prompts beside rows that decode, in captured steps and others."""
    setup = runner_setup(tiny_model(*model), max_batch_size=4, max_num_tokens=41)
    runner = start.start_runner(setup, "torch", "cpu")[0]
    replayed = pretend_captured(runner, (1, 4)) if is_padded else [4]
    kv = KvCacheManager(NUM_BLOCKS, BLOCK, enable_block_reuse=False)
    scheduler = Scheduler(kv, max_batch_size=4, max_num_tokens=41)
    loop = EngineLoop(runner, scheduler, kv, Sampler(131), StatsBuffer())
    with GenerationExecutor(loop, setup.limits) as executor:
        results = executor.generate(PROMPTS, greedy(9))
    assert 4 in replayed and kv.stats().num_live == 0
    assert outputs(results) == expected(model, PROMPTS, 9)
