"""What the log of a start says a GPU does in a lesser way: by its compute capability, and only what the engine has."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.support.device_steps import cpu_runner, runner_setup
from tests.support.executors import LLAMA, MISTRAL, tiny_model

from lamella_core.models.registry import get_model_class
from lamella_core.quantization.config import QuantConfig
from lamella_executor.runner.cuda import degraded
from lamella_executor.runner.cuda.ops import TorchOps, TritonOps
from lamella_executor.runner.cuda.runner import DeviceParts

pytest.importorskip("triton", reason="GPU kernels need triton")

A100, ADA, H100, B200 = (8, 0), (8, 9), (9, 0), (10, 0)
MIXTRAL = ("MixtralForCausalLM", "top2")
FLOAT8 = QuantConfig("FP8", "FP8")
WEIGHTS = "float8 weights are converted to bfloat16 before each product"
EXPERTS = "float8 weights of experts are widened to float16 as they are multiplied"
CONVERSIONS = "our Triton kernels convert activations and the KV cache to and from float8 with integer arithmetic"
LAUNCHES = "kernels start when the one before has ended"
PROMPTS = "long prompts go through Triton's attention"
GATES = "gates of feed-forward blocks are kernels of their own after products of many rows"
SORTED = "experts that many tokens meet read them where they are"


def setup_of(model=LLAMA, long=True, **config):
    """An engine whose sizes the kernels for Hopper serve."""
    known = tiny_model(*model).config
    sizes = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 128, "dtype": "bfloat16", **config}
    empty = get_model_class(model[0]).empty(replace(known, max_position_embeddings=1024, **sizes))
    return runner_setup(empty, max_num_tokens=1024 if long else 256, max_seq_len=1024)


def features(setup, capability, attention="triton", ops=TritonOps):
    """The lines without their reasons."""
    parts = DeviceParts(SimpleNamespace(name=attention), ops(), torch.device("cuda"))
    return {line.split(":")[0].split(",")[0] for line in degraded.degraded(setup, parts, capability)}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (A100, {WEIGHTS, CONVERSIONS, LAUNCHES, PROMPTS, GATES}),
        (ADA, {LAUNCHES, PROMPTS, GATES}),
        (H100, set()),
        (B200, {PROMPTS, GATES}),
        (None, set()),
    ],
    ids=["ampere", "ada", "hopper", "blackwell", "cpu"],
)
def test_a_dense_float8_engine(capability, expected):
    assert features(setup_of(quantization=FLOAT8), capability) == expected


def test_lines_say_what_is_needed_and_what_there_is():
    parts = DeviceParts(SimpleNamespace(name="triton"), TritonOps(), torch.device("cuda"))
    lines = degraded.degraded(setup_of(quantization=FLOAT8), parts, (8, 6))
    assert len(lines) == 5 and all(line.endswith(", and this GPU has 8.6") for line in lines)
    assert all("compute capability 8.9" in line for line in lines[:2]) and "capability 9.0" in lines[-1]


def test_only_what_the_engine_has():
    assert features(setup_of(), A100) == {LAUNCHES, PROMPTS, GATES}
    assert features(setup_of(head_dim=32), ADA) == {LAUNCHES, GATES}
    assert features(setup_of(long=False), ADA) == {LAUNCHES, GATES}
    assert features(setup_of(MISTRAL, sliding_window=300), ADA) == {LAUNCHES, GATES}
    assert features(setup_of(intermediate_size=96), ADA) == {LAUNCHES, PROMPTS}
    assert features(setup_of(hidden_act="gelu"), ADA) == {LAUNCHES, PROMPTS}
    per_channel = setup_of(quantization=QuantConfig("FP8_PER_CHANNEL_PER_TOKEN"))
    assert features(per_channel, ADA) == {LAUNCHES, PROMPTS}
    alone = setup_of(quantization=QuantConfig(None, "FP8"))
    assert features(alone, A100) - {LAUNCHES, PROMPTS, GATES} == {CONVERSIONS.replace("activations and ", "")}
    bloom = setup_of(("BloomForCausalLM", "four_heads"))
    assert PROMPTS not in features(bloom, ADA)


def test_mixtures_of_experts():
    setup = setup_of(MIXTRAL, quantization=FLOAT8)
    assert features(setup, A100) == {WEIGHTS, EXPERTS, CONVERSIONS, LAUNCHES, PROMPTS, SORTED}
    assert features(setup, B200) == {PROMPTS, SORTED}
    assert features(setup, H100) == set()
    assert SORTED not in features(setup_of(MIXTRAL, dtype="float32"), A100)


def test_other_attention_and_no_triton():
    setup = setup_of(quantization=QuantConfig("FP8"))
    assert features(setup, ADA, "flashinfer") == {LAUNCHES, "prompts go through FlashInfer's fa2", GATES}
    assert features(setup, H100, "flashinfer") == set()
    assert features(setup, A100, "torch", TorchOps) == {WEIGHTS, GATES}


def test_float32_does_without_tensor_float():
    lines = features(setup_of(dtype="float32"), H100)
    assert lines == {"float32 weights are multiplied without TensorFloat-32"}


def test_an_engine_says_it_once_when_it_starts(monkeypatch, caplog):
    monkeypatch.setattr(degraded, "_capability", lambda device: A100)
    with caplog.at_level(logging.INFO):
        cpu_runner()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("degraded: ")]
    assert len(lines) == 1 and "float32" in lines[0]
    assert all(record.levelno == logging.INFO for record in caplog.records if "degraded: " in record.getMessage())
