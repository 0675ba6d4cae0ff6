"""Bad input: one clear error each, and the engine keeps serving the others."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from tests.support.text_models import live_blocks

import lamella
from lamella import LLM, RequestError, SamplingParams
from lamella_core.errors import CheckpointError, ConfigError, EngineFormatError, UnsupportedModelError


@pytest.fixture(autouse=True)
def still_serving(llm: LLM):
    """Every test in this file ends with the engine giving the same answer as before."""
    params = SamplingParams(max_tokens=6)
    expected = llm.generate("The fox", params).text
    neighbour = llm.generate_async("The fox", params.replace(max_tokens=12, ignore_eos=True))
    yield
    assert len(neighbour.result(60).token_ids) == 12
    assert llm.generate("The fox", params).text == expected
    assert live_blocks(llm) == 0


BAD_PROMPTS = {
    "empty text": ("", "prompt is empty"),
    "empty ids": ([[]], "prompt 0: prompt has no token ids"),
    "empty in a dict": ({"prompt_token_ids": []}, "no token ids"),
    "bytes": (b"The fox", "prompt is bytes; decode it to str"),
    "lone surrogate": ("The \udc80 fox", "not valid Unicode.*character 4"),
    "id out of range": ([5, 10**9], r"prompt_token_ids\[1\] is 1000000000"),
    "negative id": ([5, -1], r"prompt_token_ids\[1\] is -1"),
    "float id": ([5, 1.5], "sequence of integers"),
    "bool id": ([5, True], "bool"),
    "None": (None, "prompt is NoneType"),
    "number": (7, "prompt is int"),
    "unknown key": ({"text": "a"}, "known: prompt, prompt_token_ids"),
    "keys of several types": ({"text": "a", 1: "b"}, "known: prompt, prompt_token_ids"),
    "dict of None": ({"prompt": None}, "nothing but None"),
    "array of no dimension": (torch.tensor(7), "prompt is"),
    "empty dict": ({}, "known: prompt, prompt_token_ids"),
    "nested": ([["a", "b"]], "sequence of integers"),
    "too long": ("fox " * 2000, "at most 255 are allowed.*truncate_prompt_tokens"),
    "too long ids": ([5] * 256, "the prompt has 256 tokens"),
}


@pytest.mark.parametrize(("prompt", "match"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts(llm: LLM, prompt, match):
    with pytest.raises(RequestError, match=match):
        llm.generate(prompt)
    if not isinstance(prompt, list):
        with pytest.raises(RequestError, match=match):
            llm.generate_async(prompt)
        with pytest.raises(RequestError, match="prompt 1: "):
            llm.generate(["The fox", prompt])


BAD_PARAMS = {
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens is 0"),
    "max_tokens negative": ({"max_tokens": -3}, "max_tokens is -3"),
    "n above limit": ({"n": 1000, "temperature": 1.0}, "n is 1000"),
    "n above batch": ({"n": 17, "temperature": 1.0}, "17"),
    "beams above engine": ({"n": 5, "use_beam_search": True}, "5"),
    "n of greedy": ({"n": 3}, "greedy"),
    "best_of below n": ({"n": 3, "best_of": 2, "temperature": 1.0}, "best_of is 2"),
    "sampled beams": ({"n": 2, "use_beam_search": True, "temperature": 0.5}, "temperature is 0.5"),
    "min above max": ({"min_tokens": 9, "max_tokens": 3}, "min_tokens is 9"),
    "NaN temperature": ({"temperature": float("nan")}, "temperature is nan"),
    "negative temperature": ({"temperature": -1.0}, "temperature is -1.0"),
    "top_p": ({"top_p": 1.5}, "top_p is 1.5"),
    "many stops": ({"stop": ["a"] * 10_000}, "10000 entries"),
    "stop token out of range": ({"stop_token_ids": [10**7]}, "stop_token_ids"),
    "bias shape": ({"embedding_bias": torch.zeros(3)}, "embedding_bias has 3 entries"),
    "stop surrogate": ({"stop": ["fox", "\ud800"]}, "SamplingParams.stop is not valid Unicode"),
    "bad word surrogate": ({"bad": "\ud800"}, "not valid Unicode"),
}


@pytest.mark.parametrize(("fields", "match"), BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_bad_params(llm: LLM, fields, match):
    with pytest.raises(RequestError, match=match):
        llm.generate("The fox", SamplingParams(**fields))


def test_params_of_a_wrong_kind(llm: LLM):
    params = SamplingParams()
    for wrong, match in (
        ({"max_tokens": 3}, "is dict"),
        ([params] * 3, "3 entries for 2 prompts"),
        ([1, 2], "is list"),
    ):
        with pytest.raises(RequestError, match=match):
            llm.generate(["a", "b"], wrong)
    with pytest.raises(RequestError, match="single prompt"):
        llm.generate("a", [params])
    with pytest.raises(RequestError, match="takes one prompt"):
        llm.generate_async(["a", "b"])


def test_nan_logits_fail_their_request(llm: LLM):
    def poison(req_id, logits, token_ids, stream_ptr, client_id):
        logits.fill_(float("nan"))

    with pytest.raises(RequestError, match="(?i)nan"):
        llm.generate("The fox", SamplingParams(logits_processor=poison))


def test_a_thousand_aborts_leave_no_block(llm: LLM):
    rng, vocab_size = random.Random(3), llm.engine.spec.model.vocab_size
    running = []
    for i in range(1000):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 30))]
        params = SamplingParams(max_tokens=rng.randrange(1, 60), ignore_eos=True, n=1 + i % 3, temperature=1.0)
        running.append(llm.generate_async(prompt, params))
        if rng.random() < 0.8:
            running.pop(rng.randrange(len(running))).abort()
    for output in running:
        output.abort()
    for output in running:
        output.result(60)


UNKNOWN = [
    ("max_batchsize", "max_batch_size"),
    ("tensor_parallel", "tensor_parallel_size"),
    ("kv_cache", "kv_cache_config"),
]


@pytest.mark.parametrize(("name", "nearest"), UNKNOWN)
def test_unknown_keyword_names_the_nearest(model_dir: Path, name, nearest):
    with pytest.raises(ConfigError, match=f"unexpected keyword argument '{name}'; did you mean '{nearest}'"):
        LLM(model_dir, **{name: 1})


BAD_ARGUMENTS = [
    ({"tensor_parallel_size": 3}, "tp_size 3 does not divide num_attention_heads"),
    ({"pipeline_parallel_size": 40}, "pp_size 40 exceeds the model's 2 layers"),
    ({"dtype": "float8"}, "dtype is 'float8'"),
    ({"load_format": "gguf"}, "load_format is 'gguf'"),
    ({"max_batch_size": 0}, "max_batch_size is 0"),
    ({"max_seq_len": 10**6}, "max_seq_len 1000000 exceeds"),
    ({"kv_cache_config": {"max_token": 5}}, "no field 'max_token'; did you mean 'max_tokens'"),
    ({"kv_cache_config": {5: 5}}, "no field 5"),
    ({"tensor_parallel_size": True}, "tensor_parallel_size is True"),
    ({"skip_tokenizer_init": "no"}, "skip_tokenizer_init is 'no'; it must be True or False"),
    ({"kv_cache_config": 5}, "kv_cache_config is int"),
    ({"skip_tokenizer_init": True, "tokenizer": "x"}, "contradict"),
    ({"tokenizer": "./no-such-dir"}, "does not exist"),
]


@pytest.mark.parametrize(("arguments", "match"), BAD_ARGUMENTS)
def test_bad_arguments(model_dir: Path, arguments, match):
    with pytest.raises(ConfigError, match=match):
        LLM(model_dir, **arguments)


@pytest.mark.parametrize("model", [None, 3, b"directory"])
def test_a_model_that_is_no_path(model):
    with pytest.raises(ConfigError, match=f"model is {type(model).__name__}; pass a directory, a hub id or an Engine"):
        LLM(model)


def test_dict_configs_and_overrides(model_dir: Path):
    with LLM(
        model_dir, kv_cache_config={"max_tokens": 640}, build_config={"max_batch_size": 9, "max_seq_len": 64},
        max_batch_size=3, enable_chunked_prefill=False,
    ) as llm:  # fmt: skip
        build = llm.engine.spec.build
        assert (build.max_batch_size, build.max_seq_len) == (3, 64)


@pytest.fixture
def broken(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_missing_weights(broken: Path):
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        LLM(broken)


@pytest.mark.parametrize("damage", ["truncated", "header", "garbage"])
def test_damaged_weights(broken: Path, damage: str):
    path = broken / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    damaged = {"truncated": data[:-100], "header": data[:8] + b"x" * size + data[8 + size :], "garbage": b"hello"}
    path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        LLM(broken)


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_wrong_shapes(broken: Path):
    edit_config(broken, intermediate_size=96)
    with pytest.raises(CheckpointError, match="mlp"):
        LLM(broken)


def test_unknown_architecture(broken: Path):
    edit_config(broken, architectures=["FancyForCausalLM"], model_type="fancy")
    with pytest.raises(UnsupportedModelError, match="FancyForCausalLM.*LlamaForCausalLM"):
        LLM(broken)


def test_contradicting_config(broken: Path):
    edit_config(broken, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="num_key_value_heads 3"):
        LLM(broken)


def test_no_such_model(tmp_path: Path):
    for model in (tmp_path / "missing", "./missing"):
        with pytest.raises(CheckpointError, match="missing"):
            LLM(model)
    with pytest.raises(CheckpointError, match="neither engine.json"):
        LLM(tmp_path)
    with pytest.raises(ConfigError, match="model is empty"):
        LLM("")


@pytest.fixture(scope="module")
def engine_dir(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines") / "engine"
    llm.save(directory)
    return directory


def test_newer_engine(engine_dir: Path, tmp_path: Path):
    directory = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    data = json.loads((directory / "engine.json").read_text())
    (directory / "engine.json").write_text(json.dumps({**data, "schema_version": 999}))
    with pytest.raises(EngineFormatError, match="999"):
        LLM(directory)


CONTRADICTING = [
    ({"dtype": "bfloat16"}, "the engine holds float32"),
    ({"max_seq_len": 32}, "built with 256"),
    ({"max_beam_width": 8}, "built with 4"),
    ({"max_batch_size": 64}, "at most 16"),
    ({"build_config": lamella.BuildConfig()}, "no effect on an engine"),
    ({"load_format": "dummy"}, "needs a Hugging Face directory"),
    ({"quant_config": lamella.QuantConfig(quant_algo="W8A16")}, "quant_config differs"),
]


@pytest.mark.parametrize(("arguments", "match"), CONTRADICTING)
def test_options_that_contradict_the_engine(engine_dir: Path, arguments, match):
    with pytest.raises(ConfigError, match=match):
        LLM(engine_dir, **arguments)


def test_limits_of_an_engine_can_be_lowered(engine_dir: Path):
    with LLM(engine_dir, max_batch_size=2, max_seq_len=256) as llm:
        assert len(llm.generate(["The fox"] * 5, SamplingParams(max_tokens=3))) == 5
