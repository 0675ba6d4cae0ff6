"""CudaRunner over models with recurrent states: the tokens of the CPU's own path, one step ahead, padded, forked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.device_steps import BLOCK, NUM_BLOCKS, pretend_captured, runner_setup
from tests.support.executors import bench, greedy, prompt, tiny_model
from tests.support.reference_context import greedy as reference_greedy

from lamella_executor import GenerationExecutor, SamplingParams
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.loop import EngineLoop
from lamella_executor.runner.cuda import start
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.stats import StatsBuffer

MODELS = pytest.mark.parametrize(
    "model",
    [
        ("MambaForCausalLM", "tied"),
        ("Mamba2ForCausalLM", "grouped"),
        ("NemotronHForCausalLM", "all_kinds"),
        ("Qwen3NextForCausalLM", "attention_first_biased"),
    ],
    ids=lambda model: model[0],
)
PROMPTS = [prompt(length, seed) for seed, length in enumerate((9, 1, 5, 23, 2, 14))]
RANDOM = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0.9, seed=5)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def executor_of(runner: Any, setup: Any) -> tuple[GenerationExecutor, KvCacheManager]:
    kv = KvCacheManager(NUM_BLOCKS, BLOCK, num_state_slots=setup.num_state_slots)
    scheduler = Scheduler(kv, max_batch_size=4, max_num_tokens=setup.limits.max_num_tokens)
    loop = EngineLoop(runner, scheduler, kv, Sampler(131), StatsBuffer())
    return GenerationExecutor(loop, setup.limits), kv


def tokens(results: list[Any]) -> list[list[list[int]]]:
    return [[output.token_ids for output in result.outputs] for result in results]


@MODELS
@pytest.mark.parametrize("is_padded", [False, True])
def test_the_engine_runs_ahead_on_it(model, is_padded):
    """Chunks of prompts beside rows that decode, more requests than slots, samples, and rows for the host."""
    setup = runner_setup(tiny_model(*model), max_batch_size=4, max_num_tokens=8)
    runner = start.start_runner(setup, "torch", "cpu")[0]
    replayed = pretend_captured(runner, (1, 4)) if is_padded else [4]
    executor, kv = executor_of(runner, setup)
    with executor:
        plain = executor.generate(PROMPTS, greedy(9))
        several = executor.generate(PROMPTS[:3], RANDOM.replace(n=3))
        penalized = executor.generate(PROMPTS[:2], greedy(8, repetition_penalty=1.3))
    assert kv.stats().num_live == 0 and 4 in replayed
    kv.check_invariants([])
    assert tokens(plain) == [[ids] for ids in reference_greedy(tiny_model(*model), PROMPTS, 9)]
    with bench(model) as host:
        assert tokens(several) == tokens(host.executor.generate(PROMPTS[:3], RANDOM.replace(n=3)))
        assert tokens(penalized) == tokens(host.executor.generate(PROMPTS[:2], greedy(8, repetition_penalty=1.3)))


def test_a_model_without_attention_has_blocks_for_all():
    setup = runner_setup(tiny_model("MambaForCausalLM", "tied"), max_batch_size=3, max_seq_len=64)
    runner, plan = start.start_runner(setup, "torch", "cpu")
    assert (plan.num_blocks, plan.num_bytes) == (3 * 64 // BLOCK, 0)
    spec = setup.model.state_specs()[0]
    assert spec.num_bytes == 64 * 3 * 4 + 64 * 8 * 4 and runner.cache_bytes == 2 * 4 * spec.num_bytes


def test_memory_that_the_states_do_not_leave():
    setup = runner_setup(tiny_model("MambaForCausalLM", "tied"), max_batch_size=3)
    needs = start.DeviceNeeds(weights=0, workspace=0, graphs=0, state=0, recurrent=2 << 30)
    memory = start.DeviceMemory(total=4 << 30, free=1 << 30)
    with pytest.raises(MemoryError, match="recurrent states of 3 sequences 2048. Lower max_batch_size"):
        start.plan_device_memory(
            needs, memory, setup.kv_config, setup.demand, block_bytes=0, tokens_per_block=BLOCK
        )  # fmt: skip
