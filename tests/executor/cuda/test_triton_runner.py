"""CudaRunner with the Triton kernels, in triton's interpreter: a prompt's chunks, decoding beside them, sampling."""

from __future__ import annotations

import pytest
import torch
from tests.support.device_steps import Drive, request_of, runner_setup
from tests.support.executors import hf_greedy, prompt

from lamella_executor.runner.cuda import start
from lamella_executor.sampling_params import SamplingParams

pytest.importorskip("triton", reason="GPU kernels need triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here: tests/gpu runs them", allow_module_level=True)

from tests.support.triton_interpreter import repair_interpreter

from lamella_executor.attention.triton_backend import TritonAttention
from lamella_executor.runner.cuda.ops import TritonOps
from lamella_executor.runner.cuda.runner import DeviceParts

repair_interpreter()


@pytest.fixture
def runner(monkeypatch):
    parts = DeviceParts(TritonAttention(), TritonOps(), torch.device("cpu"))
    monkeypatch.setattr(start, "choose_parts", lambda backend, device: parts)
    return start.start_runner(runner_setup(), "triton", "cpu")[0]


def test_steps_one_ahead(runner):
    prompts = [prompt(1), prompt(7, 1)]
    drive = Drive(runner, [request_of(p) for p in prompts], chunk=4)
    assert drive.generate(2, ahead=True) == [hf_greedy(p, 2) for p in prompts]


def test_sampled_rows_beside_rows_for_the_host(runner):
    random = SamplingParams(temperature=0.8, top_k=5, seed=3)
    requests = [request_of(prompt(6), random, seed=3), request_of(prompt(5), SamplingParams(logprobs=0))]
    step = runner.launch(Drive(runner, requests).plan())
    best = step.logits[0].topk(5).indices.tolist()
    assert step.collect()[0] in best and len(step.collect()) == 1
    assert int(step.logits[1].argmax()) == hf_greedy(prompt(5), 1)[0]
