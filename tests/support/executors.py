"""Executors over tiny random models, and what transformers says about the same prompts."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tests.support.tiny_models import hf_dir, hf_model

from lamella_core.engine import BuildConfig, Engine
from lamella_core.models.registry import get_model_class
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams, SchedulerConfig
from lamella_executor.assemble import assemble
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.loop import EngineLoop
from lamella_executor.scheduler.plan import StepPlan

LLAMA = ("LlamaForCausalLM", "grouped")
MISTRAL = ("MistralForCausalLM", "window")  # sees 6 tokens
BLOCK = 4


@functools.cache
def tiny_model(architecture: str = LLAMA[0], variant: str = LLAMA[1]) -> Any:
    directory = hf_dir(architecture, variant)
    return get_model_class(architecture).from_hugging_face(directory)


@dataclass(frozen=True)
class Bench:
    """An executor and the parts that tests look into; read them only while the engine idles."""

    executor: GenerationExecutor
    loop: EngineLoop
    kv: KvCacheManager

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the engine inside its next step meanwhile, so that what is submitted comes together."""
        gate, runner = threading.Event(), self.loop._runner

        class Gate:
            def run(self, plan: StepPlan) -> torch.Tensor:
                gate.wait(60)
                return runner.run(plan)

        self.loop._runner = Gate()
        try:
            yield
        finally:
            gate.set()
            self.loop._runner = runner

    def idle_blocks(self) -> tuple[int, int]:
        """Returns (live, lost) KV blocks; both must be 0 when nothing runs."""
        self.executor.generate([5], SamplingParams(max_tokens=1))  # everything sent before has been worked off
        stats = self.kv.stats()
        self.kv.check_invariants([])
        return stats.num_live, stats.num_total - stats.num_live - stats.num_cached - stats.num_free


@contextmanager
def bench(
    model: tuple[str, str] | Any = LLAMA,
    kv: KvCacheConfig | None = None,
    scheduler: SchedulerConfig | None = None,
    **build: Any,
) -> Iterator[Bench]:
    """Runs a tiny model (by name, or a model object) with small blocks; ``build`` goes to BuildConfig."""
    limits = {"max_batch_size": 8, "max_num_tokens": 64, "tokens_per_block": BLOCK, "max_beam_width": 8, **build}
    engine = Engine.from_model(tiny_model(*model) if isinstance(model, tuple) else model, BuildConfig(**limits))
    parts = assemble(engine, kv or KvCacheConfig(max_tokens=1024), scheduler or SchedulerConfig())
    executor = GenerationExecutor(parts.loop, parts.limits, stats=parts.stats, check_fits=parts.check_fits)
    with executor:
        yield Bench(executor, parts.loop, parts.loop._kv)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 131, (length,), generator=generator).tolist()


@functools.cache
def _generate(model: tuple[str, str], ids: tuple[int, ...], options: tuple[tuple[str, Any], ...]) -> list[list[int]]:
    out = hf_model(*model).generate(
        torch.tensor([ids]), do_sample=False, eos_token_id=None, pad_token_id=0, **dict(options)
    )
    return [row[len(ids) :].tolist() for row in out]


def hf_greedy(ids: list[int], num_tokens: int, model: tuple[str, str] = LLAMA) -> list[int]:
    return _generate(model, tuple(ids), (("max_new_tokens", num_tokens),))[0]


def hf_beams(ids: list[int], num_tokens: int, width: int, model: tuple[str, str] = LLAMA) -> list[list[int]]:
    options = (("max_new_tokens", num_tokens), ("num_beams", width), ("num_return_sequences", width))
    return _generate(model, tuple(ids), options)


@functools.cache
def _logprobs(model: tuple[str, str], ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return hf_model(*model)(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def hf_logprobs(ids: list[int], model: tuple[str, str] = LLAMA) -> torch.Tensor:
    """[len(ids), vocab_size]: row p predicts token p + 1."""
    return _logprobs(model, tuple(ids))


def greedy(num_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, **more)
