"""CudaRunner on a GPU: recorded steps, steps one ahead, and what happens when something does not work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.support.device_steps import Drive, request_of, runner_setup
from tests.support.engines import engine_of
from tests.support.executors import LLAMA, hf_greedy, hf_logprobs, prompt
from tests.support.tiny_models import hf_dir

from lamella_core import QuantConfig
from lamella_core.errors import OutOfMemoryError
from lamella_core.models.registry import get_model_class
from lamella_executor import GenerationExecutor, KvCacheConfig, SamplingParams
from lamella_executor.attention.paged_cuda import CudaStepContext, triton_rope_and_cache
from lamella_executor.runner.cuda.ops import TritonOps
from lamella_executor.runner.cuda.runner import CudaRunner
from lamella_executor.runner.cuda.start import start_runner

PROMPTS = [prompt(length, seed) for seed, length in enumerate((9, 1, 5, 13))]
RANDOM = SamplingParams(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01)


def fresh_model(architecture: str = LLAMA[0], variant: str = LLAMA[1], **options: Any) -> Any:
    return get_model_class(architecture).from_hugging_face(hf_dir(architecture, variant), **options)


def gpu_runner(model: Any = None, **options: Any) -> CudaRunner:
    return start_runner(runner_setup(model or fresh_model(), **options))[0]


@pytest.fixture
def runner() -> Iterator[CudaRunner]:
    made = gpu_runner()
    yield made
    made.close()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Operations that wait for the device raise meanwhile."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sampled(runner: CudaRunner, num_tokens: int = 20, **options: Any) -> list[list[int]]:
    requests = [request_of(p, RANDOM, seed=i - 2) for i, p in enumerate(PROMPTS)]
    return Drive(runner, requests, 6).generate(num_tokens, **options)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("chunk", [64, 3])
def test_greedy_tokens(runner, chunk, ahead):
    assert runner.num_graph_sizes == 4  # 1, 2, 4, 6
    out = Drive(runner, [request_of(p) for p in PROMPTS], chunk).generate(20, ahead=ahead)
    assert out == [hf_greedy(p, 20) for p in PROMPTS]


@pytest.mark.parametrize("count", [1, 3])
def test_padded_and_unpadded_replays(runner, count):
    out = Drive(runner, [request_of(p) for p in PROMPTS[:count]]).generate(12, ahead=True)
    assert out == [hf_greedy(p, 12) for p in PROMPTS[:count]]


def test_replay_equals_eager(runner, monkeypatch):
    replayed = sampled(runner, ahead=True)
    monkeypatch.setattr(CudaRunner, "_why_not_captured", lambda self: "a test compares")
    eager = gpu_runner()
    assert eager.num_graph_sizes == 0
    assert sampled(eager, ahead=True) == sampled(eager) == replayed
    eager.close()


@pytest.mark.parametrize("quantization", [None, QuantConfig("FP8", kv_cache_quant_algo="FP8")], ids=["bf16", "fp8"])
def test_projections_that_store_keys_equal_those_that_do_not(monkeypatch, quantization):
    """Steps of one row and of more, recorded and not: the same tokens, sampled."""
    rotated: list[int] = []

    def counted(q: torch.Tensor, *args: Any) -> None:
        rotated.append(len(q))
        triton_rope_and_cache(q, *args)

    monkeypatch.setattr(TritonOps, "rope_and_cache", staticmethod(counted))

    def tokens() -> list[list[int]]:
        rotated.clear()
        made = gpu_runner(fresh_model(dtype="bfloat16", quant_config=quantization))
        captured = min(rotated, default=0)
        generated = sampled(made, ahead=True) + Drive(made, [request_of(PROMPTS[0])]).generate(20)
        made.close()
        return [[captured], *generated]

    (least,), *stored = tokens()
    assert least > 1  # recorded steps of one row rotate in the projection
    monkeypatch.setattr(CudaStepContext, "kv_place", lambda *_: None)
    (least,), *separate = tokens()
    assert least == 1 and stored == separate


def test_launches_wait_for_nothing(runner):
    drive = Drive(runner, [request_of(p, RANDOM if i % 2 else None, seed=i) for i, p in enumerate(PROMPTS)], chunk=4)
    launched = []
    for _ in range(8):  # chunks beside decoding, then decoding alone; pending tokens are never filled in
        plan = drive.plan()
        with no_waiting():
            launched.append(runner.launch(plan))
        drive.advance(plan)
        if len(launched) > 2:
            assert all(token >= 0 for token in launched[-2].collect())


def test_rows_for_the_host_in_replayed_steps(runner):
    params = [SamplingParams(logprobs=1), None]
    requests = [request_of(p, q) for p, q in zip(PROMPTS, params)]
    drive = Drive(runner, requests)
    for position in range(4):
        plan = drive.plan()
        step = runner.launch(plan)
        tokens = {id(i.request): int(row.argmax()) for i, row in zip(plan.items, step.logits, strict=True)}
        assert step.logits.is_cuda and step.logits.dtype == torch.float32
        assert step.collect() == [tokens[id(requests[1])]]
        for item, row in zip(plan.items, step.logits, strict=True):
            expected = hf_logprobs(item.sequence.token_ids)[-1]
            torch.testing.assert_close(row.cpu().log_softmax(-1), expected, atol=2e-4, rtol=0, msg=str(position))
            item.sequence.num_computed_tokens = item.end
            item.sequence.token_ids.append(tokens[id(item.request)])


def test_blocks_are_copied_before_the_forward(runner):
    request = request_of(prompt(10))
    drive = Drive(runner, [request])
    drive.generate(2)
    sequence = request.sequences[0]
    child = sequence.fork(0)
    drive.kv.fork(sequence, child)
    other = request_of([])
    other.sequences = [child]
    drive.requests.append(other)
    drive.generate(9)
    expected = hf_greedy(prompt(10), 9)
    assert sequence.output_ids[:9] == child.output_ids[:9] == expected
    assert sequence.blocks[-1] != child.blocks[-1]


def test_a_step_that_cannot_be_recorded_runs_eagerly(caplog):
    model = fresh_model()
    model.layers["1"].register_forward_hook(lambda module, inputs, result: result[0].sum().item() and None)
    with caplog.at_level(logging.WARNING):
        runner = gpu_runner(model)
    assert runner.num_graph_sizes == 0 and "run without CUDA graphs: recording failed" in caplog.text
    out = Drive(runner, [request_of(p) for p in PROMPTS]).generate(6)
    assert out == [hf_greedy(p, 6) for p in PROMPTS]
    runner.close()


def test_memory_is_given_back():
    engine = engine_of(hf_dir(*LLAMA), "cuda")
    held = []
    for _ in range(5):
        with GenerationExecutor.create(engine, KvCacheConfig(max_gpu_total_bytes=256 << 20)) as executor:
            executor.generate([5, 6], SamplingParams(max_tokens=3))
        held.append((torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
    # The caches are 256 MiB each; PyTorch keeps a cuBLAS workspace of 32 MiB for each stream that an engine used.
    assert held[4][0] - held[1][0] <= 3 * (33 << 20)
    assert held[1][1] - held[4][1] <= 3 * (48 << 20)


def test_what_does_not_fit_is_said_before():
    engine = engine_of(hf_dir(*LLAMA), "cuda")
    with pytest.raises(OutOfMemoryError, match="no KV block fits on the device: gpu_memory_utilization 1e-06 of"):
        GenerationExecutor.create(engine, KvCacheConfig(gpu_memory_utilization=1e-6))


def test_a_step_without_memory_fails_alone(runner, monkeypatch):
    drive = Drive(runner, [request_of(p) for p in PROMPTS])
    next(drive.steps(ahead=False))
    forward = runner.forward
    monkeypatch.setattr(runner, "_graphs", type(runner._graphs)())  # so that the step runs through `forward`
    monkeypatch.setattr(runner, "forward", lambda inputs: torch.empty(1 << 42, device="cuda"))
    with pytest.raises(OutOfMemoryError, match="a step of 4 tokens and 4 rows of logits found no memory"):
        runner.launch(drive.plan())
    monkeypatch.setattr(runner, "forward", forward)
    assert drive.generate(8) == [hf_greedy(p, 8) for p in PROMPTS]


def test_general_sampling_follows_the_hosts_draws(runner):
    """Draws differ only where a random number falls next to a boundary: float32 weights against float64."""
    from tests.support.executors import bench

    with bench() as host:
        params = [RANDOM.replace(max_tokens=20, ignore_eos=True, seed=i - 2) for i in range(4)]
        expected = [result.outputs[0].token_ids for result in host.executor.generate(PROMPTS, params)]
    assert sampled(runner, ahead=True) == expected
