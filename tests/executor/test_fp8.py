"""FP8 through the whole executor: what the paged cache keeps, and the same tokens whatever the scheduling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.executors import bench, greedy, prompt
from tests.support.reference_context import ReferenceCache, forward_step
from tests.support.reference_context import greedy as reference_greedy
from tests.support.tiny_models import hf_dir

from lamella_core import AutoModelForCausalLM, Engine, QuantConfig
from lamella_core.errors import ConfigError
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams

PROMPTS = [prompt(n) for n in (3, 17, 1, 23)]


def fp8_model(algo: str | None = "FP8", kv: str | None = "FP8", **options: Any) -> Any:
    directory = hf_dir("LlamaForCausalLM", "grouped")
    return AutoModelForCausalLM.from_hugging_face(directory, quant_config=QuantConfig(algo, kv), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_tokens": 8},
        {"kv": KvCacheConfig(max_tokens=48, dtype="fp8")},
        {"kv": KvCacheConfig(max_tokens=1024, enable_block_reuse=False)},
    ],
    ids=["plain", "chunked", "tight", "no_reuse"],
)
@pytest.mark.parametrize("algo", ["FP8", None])
def test_tokens_do_not_depend_on_the_scheduling(algo: str | None, options: dict[str, Any]) -> None:
    model = fp8_model(algo)
    expected = reference_greedy(model, PROMPTS, 8)
    with bench(model, **options) as it:
        for _ in range(2):  # the second time finds the first one's blocks
            results = it.executor.generate(PROMPTS, greedy(8))
            assert [result.outputs[0].token_ids for result in results] == expected


def test_a_float8_cache_changes_numbers_by_its_rounding() -> None:
    ids = PROMPTS[1]
    exact, rounded = (
        forward_step(fp8_model(None, kv), ReferenceCache(), {0: ids})[0].log_softmax(-1) for kv in (None, "FP8")
    )
    with bench(fp8_model(None)) as it:
        entries = it.executor.generate(ids, SamplingParams(max_tokens=1, prompt_logprobs=0)).prompt_logprobs
    ours = torch.tensor([entry[token].logprob for entry, token in zip(entries[1:], ids[1:], strict=True)])
    at = (torch.arange(len(ids) - 1), torch.tensor(ids[1:]))
    assert (ours - rounded[at]).abs().max() < 1e-4
    assert 1e-3 < (ours - exact[at]).abs().mean() < 0.2


def test_the_cache_cannot_be_float8_in_an_engine_that_has_no_scales() -> None:
    engine = Engine.from_model(fp8_model("FP8", None))
    with pytest.raises(ConfigError, match="dtype is 'fp8', but the engine's KV cache has the model's dtype; build it"):
        GenerationExecutor.create(engine, KvCacheConfig(dtype="fp8"))


def test_unknown_cache_dtype() -> None:
    with pytest.raises(ConfigError, match="KvCacheConfig.dtype is 'int8'; allowed: auto, fp8"):
        KvCacheConfig(dtype="int8")


def test_dummy_models_generate() -> None:
    with bench(fp8_model(load_format="dummy")) as it:
        results = it.executor.generate(PROMPTS, greedy(4))
        assert all(len(result.outputs[0].token_ids) == 4 for result in results)
