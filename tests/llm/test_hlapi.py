"""The older API: every line of the compatibility promise is run as it was written then."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import lamella
from lamella.hlapi import (
    LLM,
    CapacitySchedulerPolicy,
    KvCacheConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    SamplingConfig,
    StreamingLLMParam,
)
from lamella_core.errors import ConfigError, RequestError
from lamella_core.quantization.config import QuantAlgo

PROMPTS = ["Once upon a time", "The fox", "It's late"]


@pytest.fixture(scope="module")
def llm(model_dir: Path):
    config = ModelConfig(model_dir=str(model_dir), max_beam_width=4)
    llm = LLM(
        config,
        tokenizer=str(model_dir),
        kv_cache_config=KvCacheConfig(max_new_tokens=24, free_gpu_memory_fraction=0.8),
        capacity_scheduling_policy=CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
        async_mode=True,
    )
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def greedy(model_dir: Path) -> list[str]:
    with lamella.LLM(model_dir) as llm:
        return [o.text for o in llm.generate(PROMPTS, lamella.SamplingParams(max_tokens=24))]


def test_generate(llm: LLM, greedy: list[str]):
    assert [o.text for o in llm.generate(PROMPTS)] == greedy
    assert llm.generate(PROMPTS[0]).text == greedy[0]


def test_default_sampling_config(llm: LLM, greedy: list[str]):
    config = llm.get_default_sampling_config()
    assert (config.max_new_tokens, config.beam_width, config.num_beams) == (24, 1, 1)
    assert [o.text for o in llm.generate(PROMPTS, sampling_config=config)] == greedy
    config.max_new_tokens = 3
    assert {len(o.token_ids) for o in llm.generate(PROMPTS, sampling_config=config)} == {3}
    per_prompt = [SamplingConfig(max_new_tokens=i) for i in (1, 2, 3)]
    assert [len(o.token_ids) for o in llm.generate(PROMPTS, per_prompt)] == [1, 2, 3]


def test_beams(llm: LLM):
    outputs = llm.generate(PROMPTS, sampling_config=SamplingConfig(beam_width=4))
    assert [len(o.outputs) for o in outputs] == [4, 4, 4]
    assert outputs[0].text == outputs[0].outputs[0].text
    for output in llm.generate(PROMPTS, sampling_config=SamplingConfig(beam_width=4, length_penalty=0.0)):
        scores = [beam.cumulative_logprob for beam in output.outputs]
        assert scores == sorted(scores, reverse=True)


def test_token_ids(llm: LLM):
    (listed,) = llm.generate([[32, 12]])
    single = llm.generate([32, 12])
    assert listed.token_ids == single.token_ids and len(single.token_ids) == 24
    assert listed.text == single.text == ""


def test_async_streaming(llm: LLM, greedy: list[str]):
    async def task(prompt: str) -> list[str]:
        return [out.text async for out in llm.generate_async(prompt, streaming=True)]

    async def run() -> list[list[str]]:
        return await asyncio.gather(*(task(p) for p in PROMPTS))

    updates = asyncio.run(run())
    assert [u[-1] for u in updates] == greedy
    assert all(len(u) > 1 for u in updates)


def test_futures(llm: LLM, greedy: list[str]):
    generations = [llm.generate_async(p) for p in PROMPTS]
    assert [g.result(timeout=10).text for g in generations] == greedy

    async def wait() -> str:
        generation = llm.generate_async(PROMPTS[0])
        return (await generation.aresult()).text

    assert asyncio.run(wait()) == greedy[0]


def test_save_and_model_config_of_the_engine(llm: LLM, greedy: list[str], tmp_path: Path):
    llm.save(tmp_path / "engine")
    with LLM(ModelConfig(tmp_path / "engine"), kv_cache_config=KvCacheConfig(max_new_tokens=24)) as loaded:
        assert [o.text for o in loaded.generate(PROMPTS)] == greedy


def test_parallel_config_says_how_many_ranks(model_dir: Path):
    config = ModelConfig(model_dir=model_dir).parallel_config
    assert config.to_arguments()["tensor_parallel_size"] is None and not config.is_multi_gpu
    config.tp_size = 2
    assert (config.world_size, config.is_multi_gpu, config.devices) == (2, True, [0, 1])
    assert config.to_arguments() == {
        "tensor_parallel_size": 2, "pipeline_parallel_size": None, "auto_parallel": False, "world_size": None,
    }  # fmt: skip
    config = ModelConfig(model_dir=model_dir)
    config.parallel_config.tp_size = 3
    with pytest.raises(ConfigError, match="tp_size 3 does not divide"):
        LLM(config)
    config = ModelConfig(model_dir=model_dir)
    config.parallel_config.auto_parallel = True
    config.parallel_config.world_size = 64
    assert config.parallel_config.to_arguments()["world_size"] == 64
    with pytest.raises(ConfigError, match="auto_parallel: no split of LlamaForCausalLM over 64 ranks works"):
        LLM(config)
    config.parallel_config.world_size = 1
    LLM(config).shutdown()


def test_parallel_config_checks():
    with pytest.raises(ConfigError, match="set auto_parallel=True first"):
        ParallelConfig().world_size = 2
    with pytest.raises(ConfigError, match="leave both at 1"):
        ParallelConfig(tp_size=2, auto_parallel=True).world_size = 2
    with pytest.raises(ConfigError, match="3 entries"):
        ParallelConfig(tp_size=2).devices = [0, 1, 2]


def test_quant_config(model_dir: Path):
    config = ModelConfig(model_dir=model_dir)
    config.quant_config.quant_algo = QuantAlgo.W4A16_AWQ
    with pytest.raises((ConfigError, NotImplementedError), match="W4A16_AWQ"):
        LLM(config)
    assert QuantConfig("fp8").to_lamella().quant_algo is QuantAlgo.FP8


def test_streaming_llm(model_dir: Path):
    param = StreamingLLMParam(max_attention_window_size=64, sink_token_length=4)
    with LLM(ModelConfig(model_dir), streaming_llm=param) as llm:
        output = llm.generate(PROMPTS[0], SamplingConfig(max_new_tokens=150, min_length=150))
        assert len(output.token_ids) == 150
        assert max(s.num_live_blocks for s in llm._llm.get_stats()) <= 5


def test_bad_configs(model_dir: Path, tmp_path: Path):
    for arguments in ({}, {"model_dir": model_dir, "model": "a/b"}):
        with pytest.raises(ConfigError, match="either model_dir"):
            ModelConfig(**arguments)
    with pytest.raises(ValueError, match="not a directory"):
        ModelConfig(tmp_path / "missing")
    with pytest.raises(ConfigError, match="no field 'temprature'; did you mean 'temperature'"):
        SamplingConfig(temprature=1.0)
    with pytest.raises(AttributeError, match="no field 'beams'"):
        _ = SamplingConfig().beams
    with pytest.raises(ConfigError, match="'async_mod'; did you mean 'async_mode'"):
        LLM(ModelConfig(model_dir), async_mod=True)


def test_arguments_of_another_kind_are_named(llm: LLM, model_dir: Path):
    with pytest.raises(ConfigError, match="config is a builtins.str; pass a lamella.hlapi.ModelConfig"):
        LLM(str(model_dir))
    config = ModelConfig(model_dir=str(model_dir))
    with pytest.raises(ConfigError, match="kv_cache_config is a lamella_executor.*pass a lamella.hlapi.KvCacheConfig"):
        LLM(config, kv_cache_config=lamella.KvCacheConfig())
    with pytest.raises(ConfigError, match="streaming_llm is 'yes'"):
        LLM(config, streaming_llm="yes")
    with pytest.raises(ConfigError, match="sampling_config is a .*SamplingParams"):
        llm.generate(PROMPTS, sampling_config=lamella.SamplingParams())


def test_nothing_of_a_sampling_config_is_dropped_in_silence(llm: LLM, model_dir: Path):
    with pytest.raises(RequestError, match="n=2.*greedy"):
        llm.generate(PROMPTS[0], sampling_config=SamplingConfig(top_k=1, num_return_sequences=2))
    with pytest.raises(RequestError, match="0 entries for 3 prompts"):
        llm.generate(PROMPTS, sampling_config=[])
    with LLM(ModelConfig(model_dir=model_dir), kv_cache_config=KvCacheConfig(max_new_tokens=0)) as other:
        with pytest.raises(RequestError, match="max_tokens is 0"):
            other.generate(PROMPTS[0])


def test_sampling_config_maps_to_params(llm: LLM):
    params = SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, random_seed=3, min_length=2).to_params(16)
    assert (params.temperature, params.top_k, params.top_p, params.seed, params.min_tokens) == (0.7, 5, 0.9, 3, 2)
    assert SamplingConfig(top_k=1, temperature=0.5).to_params(16).is_greedy
    assert SamplingConfig(num_beams=3).to_params(16).width == 3
    assert "beam_width=2" in repr(SamplingConfig(beam_width=2))
    with pytest.raises(RequestError, match="max_tokens is 0"):
        llm.generate(PROMPTS[0], SamplingConfig(max_new_tokens=0))
    with pytest.raises(RequestError, match="4"):
        llm.generate(PROMPTS[0], SamplingConfig(beam_width=5))
