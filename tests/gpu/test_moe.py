"""Mixtures of experts on a GPU: recorded like any other model, with the logits of the CPU, and the same bits always."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tests.gpu.test_runner import PROMPTS, fresh_model, gpu_runner, no_waiting, sampled
from tests.support.device_steps import Drive, request_of
from tests.support.executors import hf_greedy, hf_logprobs
from tests.support.tiny_models import TINY

from lamella_core.kernels.experts import ExpertProjection, ExpertStack, Swiglu
from lamella_core.kernels.triton import moe
from lamella_core.kernels.triton.launch import has_wgmma
from lamella_executor import SamplingParams
from lamella_executor.runner.cuda.runner import CudaRunner

WITH_EXPERTS = (
    "MixtralForCausalLM", "PhimoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Llama4ForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM",
)  # fmt: skip
ROUTED = [
    *((architecture, next(iter(TINY[architecture]))) for architecture in WITH_EXPERTS),
    *(("DeepseekV3ForCausalLM", variant) for variant in list(TINY["DeepseekV3ForCausalLM"])[1:]),
]

SORTED: tuple[dict[str, int | bool], ...] = ({"flatten": True}, {"resident": 0, "flatten": False})


@pytest.fixture(params=ROUTED, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def runner(case: tuple[str, str]) -> Iterator[CudaRunner]:
    made = gpu_runner(fresh_model(*case))
    yield made
    made.close()


def test_recorded_steps_compute_the_tokens_of_transformers(runner, case):
    assert runner.num_graph_sizes == 4  # 1, 2, 4, 6
    out = Drive(runner, [request_of(p) for p in PROMPTS], chunk=5).generate(12, ahead=True)
    assert out == [hf_greedy(p, 12, case) for p in PROMPTS]


def test_recorded_steps_compute_the_logits_of_transformers(runner, case):
    requests = [request_of(p, SamplingParams(logprobs=1)) for p in PROMPTS[:3]]  # rows that the host samples
    drive = Drive(runner, requests)
    for _ in range(4):
        plan = drive.plan()
        step = runner.launch(plan)
        for item, row in zip(plan.items, step.logits, strict=True):
            expected = hf_logprobs(item.sequence.token_ids, case)[-1]
            torch.testing.assert_close(row.cpu().log_softmax(-1), expected, atol=2e-4, rtol=0)
            item.sequence.num_computed_tokens = item.end
            item.sequence.token_ids.append(int(row.argmax()))


def test_replay_equals_eager(runner, case, monkeypatch):
    replayed = sampled(runner, ahead=True)
    monkeypatch.setattr(CudaRunner, "_why_not_captured", lambda self: "a test compares")
    eager = gpu_runner(fresh_model(*case))
    assert eager.num_graph_sizes == 0
    assert sampled(eager) == replayed
    eager.close()


def test_launches_wait_for_nothing(runner):
    drive, launched = Drive(runner, [request_of(p) for p in PROMPTS], chunk=4), []
    for _ in range(6):  # chunks beside decoding, then decoding alone; pending tokens are never filled in
        plan = drive.plan()
        with no_waiting():
            launched.append(runner.launch(plan))
        drive.advance(plan)
    assert all(token >= 0 for token in launched[-2].collect())


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [(tokens, None) for tokens in (1, 3, 64, 700)]
    + [(tokens, dataclasses.replace(moe.SORTED_TILE, **how)) for tokens in (40, 700) for how in SORTED],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_the_same_bits_every_time(dtype, tokens, tile):
    if tile is not None and not has_wgmma():
        pytest.skip("rows are sorted on Hopper")
    generator = torch.Generator("cuda").manual_seed(1)

    def projection(n: int, k: int) -> ExpertProjection:
        weight = torch.randn(32, n, k, device="cuda", generator=generator).mul_(0.1).to(dtype)
        return ExpertProjection(weight, None, torch.full((32,), 0.5, device="cuda") if dtype.itemsize == 1 else None)

    stack = ExpertStack(32, 0, projection(512, 256), projection(256, 256), torch.nn.Identity(), Swiglu())
    x = torch.randn(tokens, 256, device="cuda", generator=generator).bfloat16()
    weights, experts = torch.randn(tokens, 32, device="cuda", generator=generator).softmax(-1).topk(6, dim=-1)
    first = moe.gated_experts(x, experts, weights, stack, tile)
    assert first.isfinite().all() and first.abs().max() > 0
    assert all(torch.equal(moe.gated_experts(x, experts, weights, stack, tile), first) for _ in range(20))
    expected = torch.zeros(min(tokens, 8), 256, device="cuda")
    for token in range(len(expected)):
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            scale = 0.5 if dtype.itemsize == 1 else 1.0
            gate, up = (stack.gate_up.weight[expert].float() @ x[token].float() * scale).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[token] += weight * scale * (stack.down.weight[expert].float() @ inner)
    bound = 0.1 if dtype.itemsize == 1 else 0.02
    assert (first[:8].float() - expected).abs().max() <= bound * expected.abs().max()
