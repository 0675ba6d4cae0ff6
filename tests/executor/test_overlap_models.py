"""Real models one step ahead: the same tokens as transformers, and as the loop that waits for each step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.support.executors import BLOCK, LLAMA, MISTRAL, Bench, greedy, hf_beams, hf_greedy, prompt, tiny_model
from tests.support.launching_runner import CpuLaunchingRunner

from lamella_core.engine import BuildConfig, Engine
from lamella_core.errors import EngineDeadError
from lamella_executor import CapacitySchedulerPolicy, GenerationExecutor, KvCacheConfig, RequestStatus, SchedulerConfig
from lamella_executor.assemble import assemble
from lamella_executor.loop import EngineLoop
from lamella_executor.sampler import Sampler

VOCAB = 131
IDS = prompt(9)


@contextmanager
def ahead(
    model: tuple[str, str] = LLAMA, *, num_tokens: int = 1024, policy: str = "PREDICTED_PEAK", **build: Any
) -> Iterator[tuple[Bench, CpuLaunchingRunner]]:
    limits = {"max_batch_size": 8, "max_num_tokens": 64, "tokens_per_block": BLOCK, "max_beam_width": 8, **build}
    engine = Engine.from_model(tiny_model(*model), BuildConfig(**limits))
    scheduler = SchedulerConfig(CapacitySchedulerPolicy(policy))
    parts = assemble(engine, KvCacheConfig(max_tokens=num_tokens), scheduler)
    old = parts.loop
    runner = CpuLaunchingRunner(old._runner, VOCAB)
    loop = EngineLoop(runner, old._scheduler, old._kv, Sampler(VOCAB), parts.stats)
    executor = GenerationExecutor(loop, parts.limits, stats=parts.stats, check_fits=parts.check_fits)
    with executor:
        yield Bench(executor, loop, old._kv), runner


@pytest.mark.parametrize("model", [LLAMA, MISTRAL, ("GPT2LMHeadModel", "tied")])
def test_greedy_tokens_are_those_of_transformers(model: tuple[str, str]) -> None:
    with ahead(model) as (it, runner):
        prompts = [prompt(length, seed=length) for length in (1, 5, 9, 17, 30)]
        results = [it.executor.generate_async(ids, greedy(16), streaming=True) for ids in prompts]
        for ids, result in zip(prompts, results):
            assert result.result(60).outputs[0].token_ids == hf_greedy(ids, 16, model)
        assert runner.num_pending > 0
        assert it.idle_blocks() == (0, 0)


@pytest.mark.parametrize("policy", list(CapacitySchedulerPolicy))
def test_a_small_cache_changes_nothing(policy: CapacitySchedulerPolicy) -> None:
    with ahead(num_tokens=64, policy=policy.value, max_num_tokens=12) as (it, _):
        prompts = [prompt(length, seed=length) for length in (3, 11, 20, 14, 8, 17)]
        results = [it.executor.generate_async(ids, greedy(20)) for ids in prompts]
        for ids, result in zip(prompts, results):
            assert result.result(60).outputs[0].token_ids == hf_greedy(ids, 20)
        assert it.idle_blocks() == (0, 0)


def test_neighbours_that_the_host_samples() -> None:
    with ahead() as (it, _):
        plain = [it.executor.generate_async(IDS, greedy(20)) for _ in range(2)]
        beams = it.executor.generate_async(IDS, greedy(8, n=3, use_beam_search=True))
        scored = it.executor.generate_async(IDS, greedy(10, logprobs=2, prompt_logprobs=1))
        assert [o.token_ids for o in beams.result(60).outputs] == hf_beams(IDS, 8, 3)
        assert scored.result(60).outputs[0].token_ids == hf_greedy(IDS, 10)
        assert len(scored.prompt_logprobs or ()) == len(IDS)
        assert all(result.result(60).outputs[0].token_ids == hf_greedy(IDS, 20) for result in plain)
        assert it.idle_blocks() == (0, 0)


def test_seeded_samples_do_not_depend_on_neighbours() -> None:
    params = greedy(20, temperature=1.0, top_p=0.9, seed=3)
    with ahead() as (it, _):
        first = it.executor.generate(IDS, params).outputs[0].token_ids
        others = [it.executor.generate_async(prompt(7, seed=i), greedy(9, temperature=2.0)) for i in range(4)]
        assert it.executor.generate(IDS, params).outputs[0].token_ids == first
        assert all(other.result(60).status is RequestStatus.FINISHED for other in others)


def test_requests_aborted_at_random_leave_no_block() -> None:
    rng = random.Random(2)
    with ahead(num_tokens=256) as (it, _):
        results = []
        for _ in range(150):
            ids = prompt(rng.randrange(1, 30), seed=rng.randrange(4))
            kind = rng.choice([{}, {}, {"temperature": 1.0}, {"temperature": 1.0, "n": 2}, {"logprobs": 0}])
            results.append(it.executor.generate_async(ids, greedy(rng.randrange(1, 12), **kind), rng.random() < 0.5))
            if rng.random() < 0.4:
                rng.choice(results[-6:]).abort()
        for result in results:
            assert result.result(120).status in (RequestStatus.FINISHED, RequestStatus.CANCELLED)
            if result.status is RequestStatus.FINISHED and result.params == greedy(result.params.max_tokens):
                want = hf_greedy(result.prompt_token_ids, 12)[: result.params.max_tokens]
                assert result.outputs[0].token_ids == want
        assert it.idle_blocks() == (0, 0)


def test_shutdown_and_death_with_a_step_in_flight() -> None:
    with ahead() as (it, runner):
        running = it.executor.generate_async(IDS, greedy(100))
        while not runner.num_pending:
            pass
        it.executor.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            running.result(10)
    with ahead() as (it, runner):
        launch = runner.launch

        def breaks(plan: Any) -> Any:
            step = launch(plan)
            step.tokens = None if runner.num_pending > 5 else step.tokens
            return step

        runner.launch = breaks  # type: ignore[method-assign]
        results = [it.executor.generate_async(IDS, greedy(100)) for _ in range(3)]
        for result in results:
            with pytest.raises(EngineDeadError, match="TypeError"):
                result.result(30)
        assert not it.executor.is_alive
