"""The whole executor against transformers: same tokens whatever the scheduling, the cache and the window do."""

from __future__ import annotations

import pytest
import torch
from tests.support.executors import (
    BLOCK,
    LLAMA,
    MISTRAL,
    bench,
    greedy,
    hf_beams,
    hf_greedy,
    hf_logprobs,
    prompt,
    tiny_model,
)
from tests.support.reference_context import ReferenceCache, forward_step

from lamella_executor import CapacitySchedulerPolicy, KvCacheConfig, SamplingParams, SchedulerConfig

LENGTHS = (3, 17, 1, 30, 9, 8, 23, 4, 12, 2)
PROMPTS = [prompt(n) for n in LENGTHS]
NUM_NEW = 12

CONFIGS = {
    "plain": {},
    "chunked": {"max_num_tokens": 8},
    "one_token_steps": {"max_num_tokens": 1, "max_batch_size": 1, "max_beam_width": 1},
    "no_reuse": {"kv": KvCacheConfig(max_tokens=1024, enable_block_reuse=False)},
    "whole_blocks_only": {"kv": KvCacheConfig(max_tokens=1024, enable_partial_reuse=False)},
    "unchunked": {"scheduler": SchedulerConfig(enable_chunked_prefill=False)},
    "static": {"scheduler": SchedulerConfig(CapacitySchedulerPolicy.STATIC_BATCH)},
    "tight": {"kv": KvCacheConfig(max_tokens=48)},
    "continuous": {"kv_cache_type": "continuous"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_of_mixed_prompts(name):
    with bench(**CONFIGS[name]) as it:
        for _ in range(2):  # the second time finds the first one's blocks
            results = it.executor.generate(PROMPTS, greedy(NUM_NEW))
            for ids, result in zip(PROMPTS, results):
                assert result.outputs[0].token_ids == hf_greedy(ids, NUM_NEW)
                assert result.outputs[0].finish_reason == "length"
        assert it.idle_blocks() == (0, 0)


OTHERS = [
    ("Qwen2ForCausalLM", "upper_window"),
    ("GPT2LMHeadModel", "tied"),
    ("MixtralForCausalLM", "top2"),
    ("GptOssForCausalLM", "yarn"),
    ("Gemma2ForCausalLM", "low_caps"),
    ("BloomForCausalLM", "six_heads"),
    ("FalconForCausalLM", "one_kv_head_alibi"),
    ("GPTJForCausalLM", "half_rotary"),
    ("OPTForCausalLM", "norm_after_narrow"),
    ("Gemma3ForCausalLM", "two_bases"),
    ("Cohere2ForCausalLM", "window_first"),
    ("Olmo2ForCausalLM", "grouped"),
    ("Qwen2MoeForCausalLM", "some_dense"),
    ("PhimoeForCausalLM", "jitter"),
    ("NemotronForCausalLM", "half_rotary"),
    ("Glm4ForCausalLM", "half_rotary"),
    ("InternLM2ForCausalLM", "biased"),
    ("BaichuanForCausalLM", "alibi_2"),
    ("QWenLMHeadModel", "beyond_trained"),
]


@pytest.mark.parametrize("model", OTHERS)
def test_other_architectures(model):
    with bench(model, max_num_tokens=16) as it:
        results = it.executor.generate(PROMPTS[:5], greedy(NUM_NEW))
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(p, NUM_NEW, model) for p in PROMPTS[:5]]


@pytest.mark.parametrize("variant", ["sequential_alibi", "one_kv_head_alibi"])
def test_alibi_beyond_what_bfloat16_counts(variant):
    """Falcon rounds the positions of keys to 8 bits."""
    model, ids = ("FalconForCausalLM", variant), prompt(290)
    with bench(model, tokens_per_block=16) as it:
        result = it.executor.generate(ids, greedy(40))
        assert result.outputs[0].token_ids == hf_greedy(ids, 40, model)


def test_reuse_is_counted():
    with bench() as it:
        first = it.executor.generate(PROMPTS[3], greedy(2))
        again = it.executor.generate(PROMPTS[3], greedy(2))
        assert first.metrics.num_reused_tokens == 0
        assert 28 <= again.metrics.num_reused_tokens < 30


def test_pressure_pauses_and_resumes():
    scheduler = SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION)
    with bench(kv=KvCacheConfig(max_tokens=56), scheduler=scheduler) as it:
        results = it.executor.generate(PROMPTS, greedy(20))
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(p, 20) for p in PROMPTS]
        assert sum(r.metrics.num_pauses for r in results) > 0
        assert max(r.metrics.num_pauses for r in results) <= 4
        assert sum(s.num_paused for s in it.executor.get_stats()) == sum(r.metrics.num_pauses for r in results)
        assert it.idle_blocks() == (0, 0)


@pytest.mark.parametrize("name", ["plain", "chunked", "no_reuse"])
def test_beams_equal_transformers(name):
    prompts, width = PROMPTS[:4], 4
    params = greedy(NUM_NEW, n=width, use_beam_search=True)
    with bench(**CONFIGS[name]) as it:
        results = it.executor.generate(prompts, params)
        for ids, result in zip(prompts, results):
            assert [o.token_ids for o in result.outputs] == hf_beams(ids, NUM_NEW, width)
            assert [o.index for o in result.outputs] == list(range(width))
        assert it.idle_blocks() == (0, 0)


def test_beams_under_pressure():
    scheduler = SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION)
    params = greedy(NUM_NEW, n=3, use_beam_search=True)
    with bench(kv=KvCacheConfig(max_tokens=80), scheduler=scheduler) as it:
        results = it.executor.generate(PROMPTS[:5], params)
        for ids, result in zip(PROMPTS, results):
            assert [o.token_ids for o in result.outputs] == hf_beams(ids, NUM_NEW, 3)
        assert sum(r.metrics.num_pauses for r in results) > 0
        assert it.idle_blocks() == (0, 0)


def test_samples_share_a_prompt_and_differ():
    params = greedy(NUM_NEW, n=4, temperature=1.0, seed=7, logprobs=0)
    with bench() as it:
        result = it.executor.generate(PROMPTS[1], params)
        assert [o.index for o in result.outputs] == [0, 1, 2, 3]
        assert len({tuple(o.token_ids) for o in result.outputs}) == 4
        for output in result.outputs:
            logprobs = hf_logprobs(PROMPTS[1] + output.token_ids)[len(PROMPTS[1]) - 1 : -1]
            chosen = logprobs[range(NUM_NEW), output.token_ids]
            got = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids)]
            torch.testing.assert_close(torch.tensor(got), chosen, atol=1e-4, rtol=0)
            assert output.cumulative_logprob == pytest.approx(chosen.sum().item(), abs=1e-3)
        best = it.executor.generate(PROMPTS[1], params.replace(n=2, best_of=4))
        ranked = sorted(result.outputs, key=lambda o: -o.cumulative_logprob)[:2]
        assert [o.token_ids for o in best.outputs] == [o.token_ids for o in ranked]
        assert it.idle_blocks() == (0, 0)


PROMPT_LOGPROB_CONFIGS = {
    name: CONFIGS[name] for name in ("plain", "chunked", "one_token_steps", "no_reuse", "unchunked")
} | {
    "paused": {
        "kv": KvCacheConfig(max_tokens=56),
        "scheduler": SchedulerConfig(CapacitySchedulerPolicy.MAX_UTILIZATION),
        "max_num_tokens": 16,
    }
}


@pytest.mark.parametrize("name", PROMPT_LOGPROB_CONFIGS)
def test_prompt_logprobs_equal_transformers(name):
    with bench(**PROMPT_LOGPROB_CONFIGS[name]) as it:
        it.executor.generate(PROMPTS, greedy(2))  # fills the prefix cache
        results = it.executor.generate(PROMPTS, greedy(20, prompt_logprobs=2))
        for ids, result in zip(PROMPTS, results):
            got, want = result.prompt_logprobs, hf_logprobs(ids)
            assert len(got) == len(ids) and got[0] is None
            for position in range(1, len(ids)):
                row = want[position - 1]
                entry = got[position]
                assert {*row.topk(2).indices.tolist(), ids[position]} == set(entry)
                for token, logprob in entry.items():
                    assert logprob.logprob == pytest.approx(row[token].item(), abs=1e-4)
                    assert logprob.rank == 1 + int((row > row[token]).sum())
            assert result.outputs[0].token_ids == hf_greedy(ids, 20)
        if name == "paused":
            assert sum(r.metrics.num_pauses for r in results) > 0


@pytest.mark.parametrize("name", ["plain", "chunked", "one_token_steps", "no_reuse"])
def test_sliding_window(name):
    with bench(MISTRAL, **CONFIGS[name]) as it:
        results = it.executor.generate(PROMPTS, greedy(NUM_NEW))
        assert [r.outputs[0].token_ids for r in results] == [hf_greedy(p, NUM_NEW, MISTRAL) for p in PROMPTS]
        assert it.idle_blocks() == (0, 0)


def test_blocks_behind_the_window_are_given_back():
    """A window of 6 tokens needs 3 blocks of 4 and the chunk's; whole sequences of 60 tokens would need 15 each."""
    kv = KvCacheConfig(max_tokens=6 * BLOCK, enable_block_reuse=False)
    with bench(MISTRAL, kv=kv, max_num_tokens=4, max_batch_size=2, max_beam_width=2) as it:
        ids = prompt(40)
        assert it.executor.generate(ids, greedy(20)).outputs[0].token_ids == hf_greedy(ids, 20, MISTRAL)
        assert max(s.num_live_blocks for s in it.executor.get_stats()) <= 4


def windowed_greedy(ids: list[int], num_tokens: int, windows: list[int], sinks: int) -> list[int]:
    """Greedy tokens where layer i sees its last windows[i] tokens and the first ``sinks``."""

    class Cache(ReferenceCache):
        def append(self, request, layer, k, v):
            keys, values = super().append(request, layer, k, v)
            return _Masked(keys, windows[layer], sinks), _Masked(values, windows[layer], sinks)

    class _Masked:
        """Keys of a layer; a slice gives those that the query at its end may see."""

        def __init__(self, rows: torch.Tensor, window: int, sinks: int) -> None:
            self.rows, self.shape, self.window, self.sinks = rows, rows.shape, window, sinks

        def __getitem__(self, visible: slice) -> torch.Tensor:
            seen = [i for i in range(visible.stop) if i < self.sinks or i >= visible.stop - self.window]
            return self.rows[seen]

    cache, out = Cache(), []
    pending = ids
    for _ in range(num_tokens):
        logits = forward_step(tiny_model(*LLAMA), cache, {0: pending})[0]
        pending = [int(logits[-1].argmax())]
        out += pending
    return out


@pytest.mark.parametrize(("windows", "sinks"), [((8,), 0), ((8,), 4), ((6, 11), 3), ((5,), 1)])
@pytest.mark.parametrize("max_num_tokens", [64, 8])
def test_attention_windows_with_sink_tokens(windows, sinks, max_num_tokens):
    kv = KvCacheConfig(max_tokens=512, max_attention_window=windows, sink_token_length=sinks)
    with bench(kv=kv, max_num_tokens=max_num_tokens) as it:
        for ids in (PROMPTS[3], PROMPTS[0]):
            want = windowed_greedy(ids, 20, [windows[0], windows[-1]], sinks)
            assert it.executor.generate(ids, greedy(20)).outputs[0].token_ids == want
            assert it.executor.generate(ids, greedy(20)).outputs[0].token_ids == want  # from the cache
        assert it.idle_blocks() == (0, 0)


def test_windows_change_the_result():
    assert windowed_greedy(PROMPTS[3], 20, [5, 5], 0) != windowed_greedy(PROMPTS[3], 20, [5, 5], 1)
    assert windowed_greedy(PROMPTS[3], 20, [64, 64], 0) == hf_greedy(PROMPTS[3], 20)


def test_end_tokens_and_max_seq_len():
    with bench(max_seq_len=20) as it:
        generated = hf_greedy(PROMPTS[0], 17)
        clipped = it.executor.generate(PROMPTS[0], greedy(500)).outputs[0]
        assert (clipped.token_ids, clipped.finish_reason) == (generated, "length")
        end = generated[4]
        stopped = it.executor.generate(PROMPTS[0], SamplingParams(max_tokens=17, end_id=end)).outputs[0]
        first = generated.index(end)
        assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (generated[:first], "stop", None)
        by_id = it.executor.generate(PROMPTS[0], greedy(17, stop_token_ids=[end])).outputs[0]
        assert (by_id.token_ids, by_id.stop_reason) == (generated[:first], end)


def test_disabled_cache_computes_prompts_only():
    with bench(kv_cache_type="disabled") as it:
        result = it.executor.generate(PROMPTS[3], greedy(1, prompt_logprobs=0))
        assert result.outputs[0].token_ids == hf_greedy(PROMPTS[3], 1)
        assert len(result.prompt_logprobs) == 30


def test_stats_and_metrics():
    with bench() as it:
        results = it.executor.generate(PROMPTS[:4], greedy(8))
        it.executor.shutdown()  # the last step is recorded after its results are published
        stats = it.executor.get_stats()
    assert [s.iteration for s in stats] == list(range(1, len(stats) + 1))
    assert sum(s.num_context_tokens for s in stats) == sum(LENGTHS[:4])
    assert sum(s.num_generation_tokens for s in stats) == 4 * 7
    assert all(s.num_live_blocks + s.num_cached_blocks + s.num_free_blocks == 256 for s in stats)
    assert stats[-1].num_running == stats[-1].num_queued == stats[-1].num_live_blocks == 0
    for result, length in zip(results, LENGTHS):
        metrics = result.metrics
        assert 0 <= metrics.queue_s <= metrics.ttft_s <= metrics.e2e_s
        assert metrics.itl_mean_s > 0
        assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (length, 8)
