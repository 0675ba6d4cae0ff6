"""Several ranks generate the tokens that one generates in float32, sampled ones and beams included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.support.executors import bench, greedy, hf_beams, hf_greedy, hf_logprobs, prompt
from tests.support.sharded import open_engine, sharded_engine, threaded
from tests.support.worker_crews import wait_for

from lamella_executor import CapacitySchedulerPolicy, GenerationExecutor, RequestStatus, SamplingParams, SchedulerConfig

ONE_KV_HEAD = ("LlamaForCausalLM", "one_kv_head")  # fewer than ranks
GPT2 = ("GPT2LMHeadModel", "tied")  # 131 words: the last rank's part of the vocabulary is padded
MIXTRAL = ("MixtralForCausalLM", "top2")
PROMPTS = [prompt(n) for n in (3, 17, 1, 30, 9, 23)]
NUM_NEW = 12
SAMPLED = [
    greedy(NUM_NEW, temperature=1.0, seed=7),
    greedy(NUM_NEW, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=1 << 70),
    greedy(NUM_NEW, n=3, temperature=1.2, seed=5),
    greedy(NUM_NEW, repetition_penalty=1.3, logprobs=2),
    greedy(NUM_NEW, n=2, best_of=3, temperature=1.0, seed=3, prompt_logprobs=1),
    greedy(NUM_NEW, min_tokens=4, temperature=1.0, seed=9),
]


def outputs(results: list[Any]) -> list[list[list[int]]]:
    return [[output.token_ids for output in result.outputs] for result in results]


def check_everything(executor: GenerationExecutor, model: tuple[str, str]) -> None:
    """Greedy, sampled, forked, penalized and beam requests, side by side; prefixes are found the second time."""
    with bench(model, max_num_tokens=16) as one:
        expected = outputs(one.executor.generate(PROMPTS, SAMPLED))
    for _ in range(2):
        results = executor.generate(PROMPTS, greedy(NUM_NEW))
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(ids, NUM_NEW, model) for ids in PROMPTS]
        assert outputs(executor.generate(PROMPTS, SAMPLED)) == expected
    assert results[3].metrics is not None and results[3].metrics.num_reused_tokens >= 28
    beams = executor.generate(PROMPTS[1], greedy(NUM_NEW, n=3, use_beam_search=True))
    assert [output.token_ids for output in beams.outputs] == hf_beams(PROMPTS[1], NUM_NEW, 3, model)
    aborted = [executor.generate_async(ids, greedy(30)) for ids in PROMPTS[:3]]
    for result in aborted:
        result.abort()
    assert outputs(executor.generate(PROMPTS[:2], SAMPLED[:2])) == expected[:2]
    assert {result.result(60).status for result in aborted} <= {RequestStatus.CANCELLED, RequestStatus.FINISHED}
    assert wait_for(lambda: executor.get_stats()[-1].num_live_blocks == 0)


@pytest.fixture(
    scope="module",
    params=[(ONE_KV_HEAD, 2, 1), (GPT2, 4, 1), (MIXTRAL, 2, 2)],
    ids=["llama-2", "gpt2-4", "mixtral-ep2"],
)
def processes(request) -> Iterator[tuple[GenerationExecutor, tuple[str, str]]]:
    model, tp_size, ep_size = request.param
    with open_engine(sharded_engine(*model, tp_size, ep_size)) as executor:
        yield executor, model


def test_processes_generate_the_same(processes):
    check_everything(*processes)


@pytest.mark.parametrize(
    ("model", "tp_size", "ep_size"),
    [(ONE_KV_HEAD, 4, 1), (("LlamaForCausalLM", "grouped"), 4, 1), (GPT2, 2, 1), (MIXTRAL, 4, 2)],
)
def test_threads_generate_the_same(model, tp_size, ep_size):
    with threaded(sharded_engine(*model, tp_size, ep_size)) as (executor, ranks):
        check_everything(executor, model)
    assert len({state.step for state in ranks.states[1:]}) == 1 < ranks.states[1].step
    assert {"prefill", "decode"} == set(ranks.phases)


def test_logits_are_those_of_transformers():
    with threaded(sharded_engine(*ONE_KV_HEAD, 2)) as (executor, _):
        result = executor.generate(PROMPTS[3], SamplingParams(max_tokens=1, prompt_logprobs=0))
    got = [(entry or {})[token].logprob for entry, token in zip(result.prompt_logprobs[1:], PROMPTS[3][1:])]
    want = hf_logprobs(PROMPTS[3], ONE_KV_HEAD)[range(len(got)), PROMPTS[3][1:]]
    torch.testing.assert_close(torch.tensor(got), want, atol=1e-4, rtol=0)


def test_pauses_change_nothing():
    scheduler = SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION)
    with threaded(sharded_engine(*ONE_KV_HEAD, 2), 56, scheduler_config=scheduler) as (executor, _):
        results = executor.generate(PROMPTS, greedy(20))
        assert sum(result.metrics.num_pauses for result in results) > 0
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(ids, 20, ONE_KV_HEAD) for ids in PROMPTS]
