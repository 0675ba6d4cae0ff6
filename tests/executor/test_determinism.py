"""float32 on a CPU: a request's tokens and log-probabilities do not depend on what else the engine does."""

from __future__ import annotations

import random

import pytest
from tests.support.executors import bench, greedy, prompt

from lamella_core.kernels.cpu.build import native_status
from lamella_executor import CapacitySchedulerPolicy, GenerationResult, KvCacheConfig, SamplingParams, SchedulerConfig

SUBJECTS = {
    "greedy": greedy(16, logprobs=3),
    "greedy_penalized": greedy(16, logprobs=1, repetition_penalty=1.3, frequency_penalty=0.2),
    "sampled": greedy(16, temperature=1.0, top_p=0.9, seed=11, logprobs=3),
    "two_samples": greedy(16, temperature=0.8, top_k=20, n=2, seed=12, logprobs=1),
    "beams": greedy(16, use_beam_search=True, n=3, logprobs=0),
}
IDS = prompt(19, seed=5)


def neighbours(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(3)
    out = []
    for i in range(count):
        params = greedy(rng.randrange(1, 24), temperature=rng.choice([None, 0.9]))
        shared = IDS[: rng.choice([0, 0, 8, 17])]  # some share a prefix with the subject
        out.append((shared + prompt(rng.randrange(1, 20), seed=100 + i), params))
    return out


def outcome(result: GenerationResult) -> list[tuple[list[int], object, float | None]]:
    """Everything but the text; floats are compared bit for bit."""
    return [(list(o.token_ids), o.logprobs, o.cumulative_logprob) for o in result.outputs]


def alone() -> dict[str, list]:
    with bench(max_batch_size=64, kv=KvCacheConfig(max_tokens=4096)) as it:
        return {name: outcome(it.executor.generate(IDS, params)) for name, params in SUBJECTS.items()}


@pytest.fixture(scope="module")
def expected():
    if not native_status().available:
        pytest.skip("holds with the native kernels only")
    return alone()


def test_one_alone_or_among_45_others(expected):
    with bench(max_batch_size=64, kv=KvCacheConfig(max_tokens=4096)) as it:
        submit = it.executor.generate_async
        with it.held():
            before = [submit(ids, params) for ids, params in neighbours(45)[:22]]
            subjects = {name: submit(IDS, params) for name, params in SUBJECTS.items()}
            after = [submit(ids, params) for ids, params in neighbours(45)[22:]]
        for name, result in subjects.items():
            assert outcome(result.result(60)) == expected[name], name
        assert all(r.result(60).done for r in before + after)
        assert max(s.num_running for s in it.executor.get_stats()) > 30


SETTINGS = {
    "small_steps": {"max_num_tokens": 8},
    "tiny_blocks": {"tokens_per_block": 1},
    "no_reuse": {"kv": KvCacheConfig(max_tokens=4096, enable_block_reuse=False)},
    "paused": {
        "kv": KvCacheConfig(max_tokens=144),
        "scheduler": SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION),
        "max_num_tokens": 16,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_chunks_reuse_and_pauses_change_nothing(name, expected):
    with bench(**SETTINGS[name]) as it:
        submit = it.executor.generate_async
        others = []
        for _ in range(2):
            with it.held():
                others += [submit(ids, params) for ids, params in neighbours(6)]
                subjects = {name: submit(IDS, params) for name, params in SUBJECTS.items()}
                others += [submit(ids, params) for ids, params in neighbours(12)[6:]]
            for subject, result in subjects.items():
                assert outcome(result.result(60)) == expected[subject], subject
        num_pauses = sum(r.result(60).metrics.num_pauses for r in [*others, *subjects.values()])
        assert (num_pauses > 0) == (name == "paused")


def test_order_of_submission_changes_nothing(expected):
    with bench() as it:
        names = list(SUBJECTS)
        for order in (names, names[::-1]):
            results = {name: it.executor.generate_async(IDS, SUBJECTS[name]) for name in order}
            assert {name: outcome(r.result(60)) for name, r in results.items()} == expected


def test_unseeded_sampling_differs_between_requests():
    with bench() as it:
        texts = {tuple(it.executor.generate(IDS, greedy(16, temperature=1.0)).outputs[0].token_ids) for _ in range(4)}
        assert len(texts) == 4
