"""CudaRunner with the CPU for its device: the tokens of the CPU's own path, one step ahead or not, padded or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.device_steps import (
    BLOCK,
    NUM_BLOCKS,
    Drive,
    cpu_runner,
    float32_engine_logits,
    pretend_captured,
    request_of,
    runner_setup,
)
from tests.support.executors import LLAMA, MISTRAL, bench, greedy, hf_greedy, hf_logprobs, prompt, tiny_model

from lamella_core.errors import ConfigError
from lamella_core.quantization.config import QuantAlgo, QuantConfig
from lamella_executor import GenerationExecutor, SamplingParams
from lamella_executor.attention.paged_cpu import layer_windows
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.loop import EngineLoop
from lamella_executor.runner.base import NAN_LOGITS, LaunchingRunner
from lamella_executor.runner.cuda.dry_run import dry_plans
from lamella_executor.runner.cuda.graphs import why_not_capturable
from lamella_executor.runner.cuda.runner import CudaRunner
from lamella_executor.runner.cuda.start import start_runner
from lamella_executor.runner.cuda.state import RunnerLimits
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.stats import StatsBuffer

PROMPTS = [prompt(length, seed) for seed, length in enumerate((9, 1, 5, 13))]
RANDOM = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=5)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("chunk", [64, 3])
def test_greedy_tokens(chunk, ahead):
    out = Drive(cpu_runner(), [request_of(p) for p in PROMPTS], chunk).generate(10, ahead=ahead)
    assert out == [hf_greedy(p, 10) for p in PROMPTS]


def test_run_returns_all_logits():
    ids = prompt(14)
    logits = float32_engine_logits(cpu_runner(), ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.log_softmax(-1), hf_logprobs(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ahead", [False, True])
def test_padded_steps(ahead):
    runner = cpu_runner()
    replayed = pretend_captured(runner, (1, 2, 6))
    out = Drive(runner, [request_of(p) for p in PROMPTS], 5).generate(10, ahead=ahead)
    assert out == [hf_greedy(p, 10) for p in PROMPTS]
    assert set(replayed) == {6}  # four rows, padded
    replayed.clear()
    assert Drive(runner, [request_of(PROMPTS[0])]).generate(4) == [hf_greedy(PROMPTS[0], 4)]
    assert set(replayed) == {1}


def test_more_rows_than_any_captured_step():
    runner = cpu_runner()
    replayed = pretend_captured(runner, (1, 2))
    out = Drive(runner, [request_of(p) for p in PROMPTS]).generate(5)
    assert out == [hf_greedy(p, 5) for p in PROMPTS] and not replayed


@pytest.mark.parametrize("is_padded", [False, True])
def test_sampling_equals_the_hosts(is_padded):
    """Tokens drawn by the device's side are those that the host's sampler draws for the same seeds."""
    with bench() as host:
        results = host.executor.generate(PROMPTS, [RANDOM.replace(seed=i - 2) for i in range(4)])
    expected = [result.outputs[0].token_ids for result in results]
    runner = cpu_runner()
    if is_padded:
        pretend_captured(runner, (6,))
    requests = [request_of(p, RANDOM, seed=i - 2) for i, p in enumerate(PROMPTS)]
    assert Drive(runner, requests, 6).generate(12, ahead=True) == expected


@pytest.mark.parametrize("is_padded", [False, True])
def test_rows_for_the_host_beside_rows_for_the_device(is_padded):
    runner, drive = cpu_runner(), None
    if is_padded:
        pretend_captured(runner, (6,))
    params = [None, SamplingParams(logprobs=2), None, SamplingParams(prompt_logprobs=1)]
    requests = [request_of(p, q) for p, q in zip(PROMPTS, params, strict=True)]
    drive = Drive(runner, requests)
    for _ in range(3):
        plan = drive.plan()
        step = runner.launch(plan)
        assert step.logits is not None and step.logits.shape == (4, 131) and step.logits.dtype == torch.float32
        tokens = {id(i.request): int(row.argmax()) for i, row in zip(plan.items, step.logits, strict=True)}
        on_device = [i.request for i in plan.items if i.request.params.logprobs is i.request.params.prompt_logprobs]
        assert step.collect() == [tokens[id(request)] for request in on_device]
        for item in plan.items:
            item.sequence.num_computed_tokens = item.end
            item.sequence.token_ids.append(tokens[id(item.request)])
    assert [r.sequences[0].output_ids for r in requests] == [hf_greedy(p, 3) for p in PROMPTS]


def test_no_logits_wanted():
    runner = cpu_runner()
    request = request_of(prompt(9))
    request.sequences[0].blocks = [0, 1, 2]
    step = runner.launch(StepPlan([ScheduledSequence(request, request.sequences[0], 0, 5, 0)]))
    assert step.collect() == [] and step.logits is None


def test_copies_happen_before_the_forward():
    runner, ids = cpu_runner(), prompt(10)
    request = request_of(ids)
    request.sequences[0].blocks = [0, 1, 2]
    whole = runner.run(StepPlan([ScheduledSequence(request, request.sequences[0], 0, 10, 1)]))
    request.sequences[0].blocks = [0, 7, 9]
    last = ScheduledSequence(request, request.sequences[0], 9, 1, 1)
    copied = runner.run(StepPlan([last], block_copies=[(1, 7), (2, 9)]))
    torch.testing.assert_close(copied, whole, atol=1e-5, rtol=0)


def test_windows_are_those_of_the_cpu():
    model = tiny_model(*MISTRAL)
    setup = runner_setup(model)
    setup = replace(setup, windows=layer_windows(setup.specs, None, 0))
    runner = start_runner(setup, "torch", "cpu")[0]
    out = Drive(runner, [request_of(p) for p in PROMPTS], 4).generate(12)
    assert out == [hf_greedy(p, 12, MISTRAL) for p in PROMPTS]


def test_a_float8_cache_keeps_its_scales():
    model = tiny_model(*LLAMA)
    setup = runner_setup(model)
    object.__setattr__(model.config, "quantization", QuantConfig(kv_cache_quant_algo=QuantAlgo.FP8))
    try:
        assert setup.cache_dtype == torch.float8_e4m3fn
        runner = start_runner(setup, "torch", "cpu")[0]
    finally:
        object.__setattr__(model.config, "quantization", QuantConfig())
    ids = prompt(14)
    expected = hf_logprobs(ids)
    whole = float32_engine_logits(runner, ids).log_softmax(-1)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0, msg="a whole prompt sees its keys as they were")
    request = request_of(ids)
    request.sequences[0].blocks = [0, 1, 2, 3]
    runner.run(StepPlan([ScheduledSequence(request, request.sequences[0], 0, 6, 0)]))
    rest = runner.run(StepPlan([ScheduledSequence(request, request.sequences[0], 6, 8, 8)])).log_softmax(-1)
    assert 1e-4 < (rest - expected[6:]).abs().mean() < 0.3  # rounded, and no worse


@pytest.mark.parametrize("max_num_tokens, max_seq_len", [(16, 64), (512, 512), (600, 700), (4096, 3000)])
def test_steps_before_the_first_are_of_any_length(max_num_tokens, max_seq_len):
    """They fit the limits, prompts and a later chunk are among them."""
    limits = RunnerLimits(4, max_num_tokens, max_seq_len)
    items = [item for plan in dry_plans(limits, BLOCK, 1) for item in plan.items]
    assert all(0 < item.num_tokens <= max_num_tokens for item in items)
    assert all(item.start + item.num_tokens <= min(max_seq_len, BLOCK * len(item.sequence.blocks)) for item in items)
    assert any(item.start > 0 and item.num_tokens > 1 for item in items)
    assert (max_num_tokens >= 512 and max_seq_len > 519) == any(item.start and item.num_tokens > 500 for item in items)
    assert (max_num_tokens >= 512) == any(item.num_tokens >= 512 for item in items if not item.start)
    runner = cpu_runner()
    for plan in dry_plans(RunnerLimits(2, 24, 40), BLOCK, runner._cache.scratch_block):
        runner.launch(plan).collect()


def test_rows_that_cannot_be_sampled():
    runner = cpu_runner()
    broken = runner._model.compute_logits
    runner._model.compute_logits = lambda *a, **k: broken(*a, **k).index_fill(0, torch.tensor([1]), float("nan"))
    try:
        drive = Drive(runner, [request_of(p) for p in PROMPTS])
        tokens = runner.launch(drive.plan()).collect()
    finally:
        del runner._model.compute_logits
    assert tokens[1] == NAN_LOGITS and all(token >= 0 for token in (tokens[0], *tokens[2:]))


def test_after_a_step_that_failed_on_its_way():
    runner = cpu_runner()
    drive = Drive(runner, [request_of(p) for p in PROMPTS])
    steps = drive.steps(ahead=False)
    next(steps), next(steps)
    runner.forward = lambda inputs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(MemoryError, match="a step of 4 tokens and 4 rows of logits found no memory.*Lower"):
        runner.launch(drive.plan())
    del runner.forward
    assert drive.generate(8) == [hf_greedy(p, 8) for p in PROMPTS]


def test_updates_that_do_not_fit_the_buffer():
    runner = cpu_runner()
    runner._state.inbox.capacity = 0  # nothing fits beside the step
    runner._state.inbox.reserve = lambda count, make=runner._state.inbox.reserve: _unbounded(runner, make, count)
    assert Drive(runner, [request_of(p) for p in PROMPTS]).generate(6) == [hf_greedy(p, 6) for p in PROMPTS]


def _unbounded(runner: CudaRunner, reserve: Any, count: int) -> torch.Tensor:
    runner._state.inbox.capacity = 1 << 30
    section = reserve(count)
    runner._state.inbox.capacity = 0
    return section


def test_the_engine_runs_ahead_on_it():
    """The overlapped loop, the scheduler and this runner together; prefix reuse, several samples and penalties too."""
    setup = runner_setup(max_batch_size=4)
    runner = start_runner(setup, "torch", "cpu")[0]
    assert isinstance(runner, LaunchingRunner)
    kv = KvCacheManager(NUM_BLOCKS, BLOCK)
    scheduler = Scheduler(kv, max_batch_size=4, max_num_tokens=32)
    loop = EngineLoop(runner, scheduler, kv, Sampler(131), StatsBuffer())
    closed: list[bool] = []
    with GenerationExecutor(loop, setup.limits, close=lambda: closed.append(True)) as executor:
        prompts = [*PROMPTS, PROMPTS[3] + [7, 8]]
        plain = executor.generate(prompts, greedy(10))
        assert [r.outputs[0].token_ids for r in plain] == [hf_greedy(p, 10) for p in prompts]
        several = executor.generate(PROMPTS[0], RANDOM.replace(n=3))
        penalized = executor.generate(PROMPTS[:2], greedy(8, repetition_penalty=1.3))
    assert closed == [True] and kv.stats().num_live == 0
    with bench() as host:
        assert _tokens(host.executor.generate(PROMPTS[0], RANDOM.replace(n=3))) == _tokens(several)
        for expected, result in zip(host.executor.generate(PROMPTS[:2], greedy(8, repetition_penalty=1.3)), penalized):
            assert _tokens(expected) == _tokens(result)


@pytest.mark.parametrize("is_padded", [False, True])
def test_requests_left_out_of_a_step_go_on_with_their_own_tokens(is_padded, small_tiles, monkeypatch):
    """Their last token is sampled in the step before, and their next block is there before they use it."""
    setup = runner_setup(max_batch_size=4)
    runner = start_runner(setup, "torch", "cpu")[0]
    if is_padded:
        pretend_captured(runner, (4,))
    kv = KvCacheManager(NUM_BLOCKS, BLOCK)
    scheduler = Scheduler(kv, max_batch_size=4, max_num_tokens=32, row_tile=4)
    left_out: list[ScheduledSequence] = []
    surplus = scheduler._tiles.surplus

    def recorded(*step: Any) -> list[ScheduledSequence]:
        left = surplus(*step)
        left_out.extend(left)
        return left

    monkeypatch.setattr(scheduler._tiles, "surplus", recorded)
    prompts = [prompt(6 + seed % 5, seed) for seed in range(24)]
    params = [greedy(4 + seed % 9) for seed in range(24)]
    with GenerationExecutor(EngineLoop(runner, scheduler, kv, Sampler(131), StatsBuffer()), setup.limits) as executor:
        results = executor.generate(prompts, params)
    assert len(left_out) > 5
    expected = [hf_greedy(p, q.max_tokens) for p, q in zip(prompts, params, strict=True)]
    assert [result.outputs[0].token_ids for result in results] == expected


def _tokens(result: Any) -> list[list[int]]:
    return [output.token_ids for output in result.outputs]


def test_what_cannot_be_captured_says_why(monkeypatch):
    experts = tiny_model("MixtralForCausalLM", "top2")
    monkeypatch.setattr("lamella_core.kernels.triton.is_available", lambda: True)
    assert why_not_capturable(tiny_model(*LLAMA)) is None and why_not_capturable(experts) is None
    monkeypatch.setattr("lamella_core.kernels.triton.is_available", lambda: False)
    reason = why_not_capturable(experts)
    assert reason == "layers.0.mlp.experts (GatedExperts) waits for values of the device"


def test_unknown_backends_are_named():
    with pytest.raises(ConfigError, match="attn_backend is 'xformers'; allowed: auto, triton, flashinfer, torch"):
        start_runner(runner_setup(), "xformers", "cpu")
