"""CudaRunner with the Triton kernels, in triton's interpreter: a prompt's chunks, decoding beside them, sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.attention_steps import make_layer, make_queries, make_step
from tests.support.device_steps import Drive, request_of, runner_setup
from tests.support.executors import LLAMA, hf_greedy, prompt, tiny_model

from lamella_executor.runner.cuda import start
from lamella_executor.sampling_params import SamplingParams

pytest.importorskip("triton", reason="GPU kernels need triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here: tests/gpu runs them", allow_module_level=True)

from tests.support.triton_interpreter import repair_interpreter

from lamella_executor.attention.torch_backend import TorchAttention
from lamella_executor.attention.triton_backend import TritonAttention
from lamella_executor.runner.cuda.ops import TritonOps
from lamella_executor.runner.cuda.runner import DeviceParts

repair_interpreter()


@pytest.fixture
def make_runner(monkeypatch):
    parts = DeviceParts(TritonAttention(), TritonOps(), torch.device("cpu"))
    monkeypatch.setattr(start, "choose_parts", lambda *_: parts)
    return lambda model=LLAMA: start.start_runner(runner_setup(tiny_model(*model)), "triton", "cpu")[0]


@pytest.fixture
def runner(make_runner):
    return make_runner()


def test_steps_one_ahead(runner):
    prompts = [prompt(1), prompt(7, 1)]
    drive = Drive(runner, [request_of(p) for p in prompts], chunk=4)
    assert drive.generate(2, ahead=True) == [hf_greedy(p, 2) for p in prompts]


@pytest.mark.parametrize(
    "model",
    [("ChatGLM1Model", "chat"), ("GLMModel", "last_blank"), ("Phi3SmallForCausalLM", "sparse_first")],
    ids=lambda model: model[0],
)
def test_prefixes_and_sparse_attention(make_runner, model):
    prompts = [prompt(1), prompt(9, 1), [*prompt(7, 2), 58, 125, 30]]
    requests, rule = [request_of(p) for p in prompts], tiny_model(*model).config.prefix_rule
    for request, ids in zip(requests, prompts) if rule is not None else ():
        prefix, (sequence,) = rule.of(ids), request.sequences
        sequence.num_prefix_tokens, sequence.mask_place = prefix.num_tokens, prefix.mask_place
    assert Drive(make_runner(model), requests).generate(2, ahead=True) == [hf_greedy(p, 2, model) for p in prompts]


def test_sampled_rows_beside_rows_for_the_host(runner):
    random = SamplingParams(temperature=0.8, top_k=5, seed=3)
    requests = [request_of(prompt(6), random, seed=3), request_of(prompt(5), SamplingParams(logprobs=0))]
    step = runner.launch(Drive(runner, requests).plan())
    best = step.logits[0].topk(5).indices.tolist()
    assert step.collect()[0] in best and len(step.collect()) == 1
    assert int(step.logits[1].argmax()) == hf_greedy(prompt(5), 1)[0]


@pytest.mark.parametrize("queries", [(1, 4, 6, 12), (1, 4, 3, 5), (6, 12), (1, 1, 12)], ids=str)
def test_prompts_that_begin_in_a_step_read_no_float8(queries):
    """The last ones of the step; chunks before them go on over the cache, all in one result."""
    contexts = [9, 20, 6, 12][-len(queries) :]
    step = make_step("cpu", contexts, queries)
    assert step.num_whole == {4: 2 if queries[-1] == 12 else 0, 2: 2, 3: 1}[len(queries)]
    scales = torch.tensor([0.5, 1.25])
    layer = make_layer("cpu", cache_dtype=torch.float8_e4m3fn, kv_scales=scales)
    q, count = make_queries(step, layer)[step.num_decode :], step.num_tokens - step.num_decode
    own = torch.randn(count, 4, 64, generator=torch.Generator().manual_seed(2)).bfloat16().split(2, dim=1)
    theirs = TorchAttention().begin(step)
    for call in (layer, replace(layer, own=own)):
        out = torch.full_like(q, 7.0).contiguous()
        result = TritonAttention().begin(step).prefill(q, call, out)
        assert result is out
        torch.testing.assert_close(result, theirs.prefill(q, call), atol=2e-2, rtol=2e-2)
    if step.num_whole:
        assert not torch.equal(theirs.prefill(q, layer), theirs.prefill(q, replace(layer, own=own)))


def test_rounded_alibi():
    """Beyond the positions that bfloat16 counts."""
    step = make_step("cpu", [300, 270], [1, 4])
    slopes = torch.linspace(0.02, 0.8, 8).bfloat16().float()
    layer = make_layer("cpu", dtype=torch.float32, alibi_slopes=slopes, rounds_alibi=True)
    q = make_queries(step, layer, torch.float32)
    ours, theirs = TritonAttention().begin(step), TorchAttention().begin(step)
    torch.testing.assert_close(ours.decode(q[:1], layer), theirs.decode(q[:1], layer), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.prefill(q[1:], layer), theirs.prefill(q[1:], layer), atol=1e-4, rtol=1e-4)
