"""Many requests of random lengths, a third of them aborted: nothing is lost, and the rest is right."""

from __future__ import annotations

import random

from tests.support.engines import engine_of
from tests.support.tiny_models import hf_dir

from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams, SchedulerConfig
from lamella_executor.assemble import assemble

NUM_REQUESTS, NUM_ABORTED = 2000, 600


def test_aborts_among_two_thousand_requests():
    source = random.Random(5)
    engine = engine_of(
        hf_dir("LlamaForCausalLM", "grouped"), "cuda", max_batch_size=128, max_num_tokens=512, tokens_per_block=16
    )
    requests = [
        ([source.randrange(3, 131) for _ in range(source.randint(1, 30))], source.randint(1, 30))
        for _ in range(NUM_REQUESTS)
    ]
    aborted = set(source.sample(range(NUM_REQUESTS), NUM_ABORTED))
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for _, count in requests]
    parts = assemble(engine, KvCacheConfig(max_tokens=4096), SchedulerConfig())
    with GenerationExecutor(parts.loop, parts.limits, stats=parts.stats, check_fits=parts.check_fits) as executor:
        outputs = [executor.generate_async(prompt, one) for (prompt, _), one in zip(requests, params, strict=True)]
        for index in sorted(aborted, key=lambda _: source.random()):
            outputs[index].abort()
        tokens = [
            output.result(timeout=120).outputs[0].token_ids if i not in aborted else None
            for i, output in enumerate(outputs)
        ]
        for index in aborted:
            outputs[index].result(timeout=120)
        executor.generate([5], SamplingParams(max_tokens=1))  # everything sent before has been worked off
        stats = parts.loop._kv.stats()
        assert stats.num_live == 0 and stats.num_free + stats.num_cached == stats.num_total
        kept = [i for i in range(NUM_REQUESTS) if i not in aborted]
        again = executor.generate([requests[i][0] for i in kept], [params[i] for i in kept])
    assert [tokens[i] for i in kept] == [result.outputs[0].token_ids for result in again]


def test_two_engines_in_one_process():
    engines = [engine_of(hf_dir("LlamaForCausalLM", variant), "cuda") for variant in ("grouped", "one_kv_head")]
    prompts, params = [[5, 6, 7], [9] * 12], SamplingParams(max_tokens=12, ignore_eos=True)

    def tokens(executor: GenerationExecutor) -> list[list[int]]:
        return [result.outputs[0].token_ids for result in executor.generate(prompts, params)]

    alone = []
    for engine in engines:
        with GenerationExecutor.create(engine, KvCacheConfig(max_tokens=1024)) as executor:
            alone.append(tokens(executor))
    with (
        GenerationExecutor.create(engines[0], KvCacheConfig(max_tokens=1024)) as first,
        GenerationExecutor.create(engines[1], KvCacheConfig(max_tokens=1024)) as second,
    ):
        pending = [executor.generate_async(p, params) for p in prompts for executor in (first, second)]
        together = [output.result(timeout=60).outputs[0].token_ids for output in pending]
        assert [together[::2], together[1::2]] == alone
        assert [tokens(first), tokens(second)] == alone
