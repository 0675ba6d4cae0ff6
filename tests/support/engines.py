"""Engines on either device, and what they say about prompts: for comparing paths with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamella_builder import BuildConfig, build
from lamella_core import AutoModelForCausalLM
from lamella_core.engine import Engine
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams, SchedulerConfig


def engine_of(
    directory: Path, device: str, dtype: str = "float32", *, load: dict[str, Any] | None = None, **limits: Any
) -> Engine:
    """Builds a Hugging Face directory's engine without timing kernels; ``limits`` go to BuildConfig."""
    model = AutoModelForCausalLM.from_hugging_face(directory, dtype=dtype, **(load or {}))
    config = {"max_batch_size": 8, "max_num_tokens": 256, "kernel_selection": "default", **limits}
    return build(model, BuildConfig(device=device, **config))


def executor_of(
    engine: Engine, *, scheduler: SchedulerConfig | None = None, attn_backend: str = "auto", **kv: Any
) -> GenerationExecutor:
    config = KvCacheConfig(**{"max_tokens": 8192, **kv})
    return GenerationExecutor.create(engine, config, scheduler, attn_backend=attn_backend)


def greedy(engine: Engine, prompts: Sequence[list[int]], num_tokens: int = 24, **options: Any) -> list[list[int]]:
    """Returns the greedy tokens of each prompt, all submitted at once."""
    with executor_of(engine, **options) as executor:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        return [result.outputs[0].token_ids for result in executor.generate(list(prompts), params)]


def prompt_logprobs(engine: Engine, prompts: Sequence[list[int]], **options: Any) -> list[list[float]]:
    """Returns the log-probability of each prompt token after the first (teacher forcing), per prompt."""
    with executor_of(engine, **options) as executor:
        results = executor.generate(list(prompts), SamplingParams(max_tokens=1, prompt_logprobs=0))
    return [
        [entry[token].logprob for entry, token in zip(result.prompt_logprobs[1:], ids[1:])]
        for result, ids in zip(results, prompts, strict=True)
    ]


def perplexity(engine: Engine, documents: Sequence[list[int]], **options: Any) -> float:
    """Returns exp of the mean negative log-probability of all tokens after each document's first."""
    values = [value for row in prompt_logprobs(engine, documents, **options) for value in row]
    return math.exp(-sum(values) / len(values))
