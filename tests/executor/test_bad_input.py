"""Bad requests, configurations and directories: one clear error each, and the engine keeps serving."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.executors import LLAMA, bench, greedy, hf_greedy, prompt, tiny_model
from tests.support.tiny_models import hf_dir

from lamella_core.engine import BuildConfig, Engine
from lamella_core.errors import CheckpointError, ConfigError, EngineFormatError, OutOfMemoryError, RequestError
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams, SchedulerConfig
from lamella_executor.admission import make_request

IDS = prompt(6)


@pytest.fixture(scope="module")
def it():
    with bench(max_beam_width=4, max_input_len=50, kv=KvCacheConfig(max_tokens=160)) as made:
        yield made


BAD_PROMPTS = {
    "empty": ([], "prompt_token_ids is empty"),
    "too_long": ([5] * 64, "64 tokens; at most 50 are allowed"),
    "longer_than_max_input_len": ([5] * 51, "max_input_len 50"),
    "id_too_large": ([5, 131], r"prompt_token_ids\[1\] is 131; token ids must be in 0..130"),
    "negative_id": ([-1], r"prompt_token_ids\[0\] is -1"),
    "text": ("hello", "is a str; it must be token ids"),
    "float_ids": ([1.5, 2.0], "sequence of integers, not of float"),
    "bools": ([True, False], "a bool is no token id"),
    "none": (None, "sequence of integers, not of NoneType"),
    "words": (["a", "b"], "sequence of integers, not of str"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(it, name):
    ids, message = BAD_PROMPTS[name]
    with pytest.raises(RequestError, match=message):
        it.executor.generate_async(ids, greedy(4))
    with pytest.raises(RequestError, match=message):
        it.executor.generate(ids, greedy(4))


BAD_PARAMS = {
    "beams_above_the_engine's": (dict(n=5, use_beam_search=True), "beam width is 5"),
    "samples_above_the_engine's": (dict(n=9, temperature=1.0), "9 sequences"),
    "never_fits": (dict(n=8, temperature=1.0, max_tokens=50), "KV cache blocks"),
    "stop_without_decoder": (dict(stop="x"), "no decoder"),
    "bad_without_ids": (dict(bad="x"), "bad_words_ids"),
    "stop_id_outside": (dict(stop_token_ids=[131]), r"SamplingParams.stop_token_ids\[0\] is 131"),
    "end_id_outside": (dict(end_id=131, min_tokens=2), "SamplingParams.end_id is 131; it must be in 0..130"),
    "bad_id_outside": (dict(bad_token_ids=[3, 999]), r"SamplingParams.bad_token_ids\[1\] is 999"),
    "bias_of_wrong_size": (dict(embedding_bias=torch.zeros(7)), "has 7 entries; it needs vocab_size, 131"),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_bad_parameters_for_this_engine(it, name):
    fields, message = BAD_PARAMS[name]
    with pytest.raises(RequestError, match=message):
        it.executor.generate_async(IDS, SamplingParams(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_tokens=0),
        dict(max_tokens=-1),
        dict(temperature=math.nan),
        dict(min_tokens=9, max_tokens=8),
        dict(n=2),
        dict(n=3, best_of=2, temperature=1.0),
        dict(stop=[f"{i}" for i in range(10_000)]),
        dict(temperature=0.5, use_beam_search=True, n=2),
    ],
)
def test_bad_parameters_for_any_engine(fields):
    with pytest.raises(RequestError, match="SamplingParams"):
        SamplingParams(**fields)


@pytest.mark.parametrize("words", [[[]], [[131]], [[1] * 300], [[1]] * 2000, ["ab"]])
def test_bad_words_that_make_no_sense(it, words):
    with pytest.raises(RequestError, match="bad_words_ids"):
        it.executor.generate_async(IDS, greedy(4), bad_words_ids=words)


def test_a_list_with_one_bad_prompt_runs_nothing(it):
    before = len(it.executor.get_stats())
    with pytest.raises(RequestError, match="empty"):
        it.executor.generate([IDS, []], greedy(4))
    with pytest.raises(RequestError, match="1 entries for 2 prompts"):
        it.executor.generate([IDS, IDS], [greedy(4)])
    with pytest.raises(RequestError, match="single prompt"):
        it.executor.generate(IDS, [greedy(4)])
    with pytest.raises(RequestError, match="pass a SamplingParams"):
        it.executor.generate_async(IDS, {"max_tokens": 3})
    assert len(it.executor.get_stats()) == before


def test_the_engine_still_serves_the_others(it):
    assert it.executor.generate(IDS, greedy(10)).outputs[0].token_ids == hf_greedy(IDS, 10)
    assert it.idle_blocks() == (0, 0)


def test_integer_types_of_other_libraries_are_ids_too(it):
    want = hf_greedy(IDS, 4)
    for ids in (tuple(IDS), np.array(IDS), torch.tensor(IDS), [np.int32(i) for i in IDS], range(IDS[0], IDS[0] + 1)):
        result = it.executor.generate_async(ids, greedy(4)).result(30)
        assert result.prompt_token_ids == [int(i) for i in ids]
        assert len(ids) == 1 or result.outputs[0].token_ids == want
    for batch in (np.array([IDS, IDS]), [np.array(IDS)] * 2, torch.tensor([IDS, IDS]), (tuple(IDS), IDS)):
        assert [r.outputs[0].token_ids for r in it.executor.generate(batch, greedy(4))] == [want, want]
    params = [greedy(2), greedy(3)]
    assert [r.outputs[0].length for r in it.executor.generate([IDS, IDS], params)] == [2, 3]


def test_truncation_keeps_the_end_of_the_prompt(it):
    result = it.executor.generate(prompt(40), greedy(4, truncate_prompt_tokens=7))
    assert result.prompt_token_ids == prompt(40)[-7:]
    assert result.outputs[0].token_ids == hf_greedy(prompt(40)[-7:], 4)


def test_bad_words_are_not_generated(it):
    plain = hf_greedy(IDS, 8)
    result = it.executor.generate_async(IDS, greedy(8, bad="w"), bad_words_ids=[[plain[0]], plain[1:3]]).result(30)
    assert plain[0] not in result.outputs[0].token_ids


def test_prompts_longer_than_a_step_without_chunking():
    with bench(max_num_tokens=16, scheduler=SchedulerConfig(enable_chunked_prefill=False)) as it:
        with pytest.raises(RequestError, match="enable_chunked_prefill"):
            it.executor.generate(prompt(17), greedy(2))
        assert it.executor.generate(prompt(16), greedy(2)).outputs[0].token_ids == hf_greedy(prompt(16), 2)


def test_a_disabled_cache_generates_nothing_more():
    with bench(kv_cache_type="disabled") as it, pytest.raises(RequestError, match="kv_cache_type='disabled'"):
        it.executor.generate(IDS, greedy(2))


def small_engine(**build) -> Engine:
    return Engine.from_model(tiny_model(), BuildConfig(**{"max_batch_size": 4, "max_num_tokens": 32, **build}))


def test_directories_that_are_no_engine(tmp_path):
    with pytest.raises(EngineFormatError, match="Hugging Face directory.*lamella-build.*lamella.LLM"):
        GenerationExecutor.create(hf_dir(*LLAMA))
    tiny_model().save_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(EngineFormatError, match="Lamella checkpoint"):
        GenerationExecutor.create(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="does not exist"):
        GenerationExecutor.create(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no model directory"):
        GenerationExecutor.create(tmp_path / "empty")


def test_limits_can_only_be_lowered():
    engine = small_engine()
    for limits in ({"max_batch_size": 5}, {"max_batch_size": 0}, {"max_num_tokens": 33}, {"max_num_tokens": True}):
        with pytest.raises(ConfigError, match="was built for"):
            GenerationExecutor.create(engine, **limits)
    with GenerationExecutor.create(
        engine, KvCacheConfig(max_tokens=64), max_batch_size=1, max_num_tokens=8
    ) as executor:
        assert (executor.limits.max_batch_size, executor.limits.max_num_tokens) == (1, 8)


def test_caches_that_do_not_fit():
    engine = small_engine()
    with pytest.raises(OutOfMemoryError, match="max_tokens is 1000000000000.*lower max_tokens"):
        GenerationExecutor.create(engine, KvCacheConfig(max_tokens=10**12))
    with pytest.raises(OutOfMemoryError, match="host_memory_bytes is 100, less than one KV block"):
        GenerationExecutor.create(engine, KvCacheConfig(host_memory_bytes=100))
    with pytest.raises(ConfigError, match="kv_cache_type='continuous'"):
        GenerationExecutor.create(small_engine(kv_cache_type="continuous"), KvCacheConfig(tokens_per_block=8))


def test_a_foreign_cpu_is_reported(caplog, monkeypatch):
    engine = small_engine()
    monkeypatch.setattr(Engine, "check_machine", lambda self: "the engine's kernels were chosen on another CPU")
    with GenerationExecutor.create(engine, KvCacheConfig(max_tokens=64)) as executor:
        assert executor.generate(IDS, greedy(10)).outputs[0].token_ids == hf_greedy(IDS, 10)
    assert "another CPU" in caplog.text


@pytest.mark.parametrize("params", [5, "greedy", {"max_tokens": 3}])
def test_parameters_of_a_wrong_type(it, params):
    for prompts in (IDS, [IDS]):
        with pytest.raises(RequestError, match="sampling_params is a"):
            it.executor.generate(prompts, params)


def test_prompts_are_any_iterable_with_an_order(it):
    expected = it.executor.generate(IDS, greedy(3)).outputs[0].token_ids
    made = it.executor.generate_async((token for token in IDS), greedy(3))
    assert made.result(30).outputs[0].token_ids == expected
    for unordered in ({4, 5}, {4: 5}):
        with pytest.raises(RequestError, match="has no order"):
            it.executor.generate_async(unordered)


def test_end_tokens_outside_the_vocabulary_never_come(it):
    limits = replace(it.executor.limits, eos_token_ids=(2, 131))
    assert make_request(1, IDS, SamplingParams(min_tokens=3), limits).extra_end_ids == ()


@pytest.mark.parametrize(
    "fields",
    [
        dict(free_gpu_memory_fraction="0.5"),
        dict(max_attention_window=5.0),
        dict(max_attention_window=True),
        dict(max_attention_window=[4, 0]),
        dict(sink_token_length=True, max_attention_window=4),
        dict(enable_block_reuse="no"),
    ],
)
def test_cache_options_of_a_wrong_type(fields):
    with pytest.raises(ConfigError, match=f"KvCacheConfig.{next(iter(fields))} is"):
        KvCacheConfig(**fields)


@pytest.mark.parametrize(
    "options",
    [dict(kv_cache_config={"max_tokens": 5}), dict(scheduler_config="MAX_UTILIZATION"), dict(stats_capacity=-1)],
)
def test_executor_options_of_a_wrong_type(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is"):
        GenerationExecutor.create(Engine.from_model(tiny_model(), BuildConfig()), **options)
