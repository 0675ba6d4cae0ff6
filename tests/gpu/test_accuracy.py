"""What the GPU computes, against the CPU oracle: float32 logits, bfloat16 and float8 by teacher forcing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.engines import engine_of, greedy, perplexity, prompt_logprobs
from tests.support.tiny_models import hf_dir, tiny_cases
from transformers import AutoTokenizer

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
NUM_DOCUMENTS = 40

FLOAT32_BOUND = 2e-4  # largest difference of a log-probability
HALF_BOUND = {"bfloat16": 0.06, "float16": 0.01}  # mean difference of a log-probability


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Token ids of held-out documents, end of sequence included."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "demo-4m")
    texts = (DEMO / "heldout.txt").read_text(encoding="utf-8").split("\n\n")[:NUM_DOCUMENTS]
    return [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]


def limits(case: tuple[str, str]) -> dict[str, int]:
    """Small blocks, and steps that cut the longer prompts."""
    return {"tokens_per_block": 16, "max_num_tokens": 48}


@pytest.mark.parametrize("case", tiny_cases(), ids="-".join)
def test_float32_equals_the_cpu(case, prompts):
    prompts = [prompt[:18] for prompt in prompts]  # the shortest context of the tiny models is 20
    cpu, gpu = (engine_of(hf_dir(*case), device, **limits(case)) for device in ("cpu", "cuda"))
    for expected, values in zip(prompt_logprobs(cpu, prompts), prompt_logprobs(gpu, prompts), strict=True):
        assert max((abs(a - b) for a, b in zip(expected, values, strict=True)), default=0.0) < FLOAT32_BOUND
    assert greedy(gpu, prompts, 2) == greedy(cpu, prompts, 2)


# SparseMixer's choice of experts jumps where two scores are near: a rounded score may choose another one.
JUMPING = {"PhimoeForCausalLM", "PhiMoEForCausalLM"}


@pytest.mark.parametrize("dtype", HALF_BOUND)
@pytest.mark.parametrize("case", [case for case in tiny_cases() if case[0] not in JUMPING], ids="-".join)
def test_half_precision_is_near(case, dtype, prompts):
    prompts = [prompt[:18] for prompt in prompts if len(prompt) > 1]
    expected = prompt_logprobs(engine_of(hf_dir(*case), "cpu", **limits(case)), prompts)
    values = prompt_logprobs(engine_of(hf_dir(*case), "cuda", dtype, **limits(case)), prompts)
    gaps = [abs(a - b) for row, other in zip(expected, values, strict=True) for a, b in zip(row, other, strict=True)]
    assert sum(gaps) / len(gaps) < HALF_BOUND[dtype]


@pytest.mark.parametrize("name", ["demo-4m", "demo-draft"])
def test_bfloat16_perplexity_within_half_a_percent(name, documents):
    expected = perplexity(engine_of(DEMO / name, "cpu"), documents)
    assert 1.1 < expected < 1.5
    assert perplexity(engine_of(DEMO / name, "cuda", "bfloat16"), documents) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("algo", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
@pytest.mark.parametrize("kv_algo", [None, "FP8"])
def test_float8_perplexity_within_three_percent(algo, kv_algo, documents):
    from lamella_core.quantization.config import QuantConfig

    plain = perplexity(engine_of(DEMO / "demo-4m", "cuda", "bfloat16"), documents)
    quantized = {"quant_config": QuantConfig(quant_algo=algo, kv_cache_quant_algo=kv_algo)}
    engine = engine_of(DEMO / "demo-4m", "cuda", "bfloat16", load=quantized)
    assert perplexity(engine, documents) == pytest.approx(plain, rel=3e-2)
