"""Models made, read, moved and built on a real GPU, and engines that keep their weights there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.support.tiny_models import hf_dir

from lamella_builder import build
from lamella_builder.steps.gpu_timing import graph_seconds
from lamella_core import disk_cache, placement
from lamella_core.auto import AutoModelForCausalLM
from lamella_core.checkpoint.layout import arrange, matmul_weights
from lamella_core.device import free_gpu_bytes, gpu_fingerprint
from lamella_core.engine import BuildConfig, Engine
from lamella_core.errors import OutOfMemoryError
from lamella_core.kernels.matmul import default_plan
from lamella_core.layers.parameter import set_parameter
from lamella_core.models.base import CausalLM
from lamella_core.models.llama import LlamaConfig, LlamaForCausalLM
from lamella_core.quantization.config import QuantAlgo, QuantConfig

QUICK = BuildConfig(max_batch_size=4, max_num_tokens=64, max_seq_len=32, device="cuda", kernel_selection="default")


def config(dtype: str = "bfloat16", quantization: QuantConfig | None = None) -> LlamaConfig:
    return LlamaConfig(
        architecture="LlamaForCausalLM", model_type="llama", vocab_size=4096, hidden_size=1024, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, head_dim=128, intermediate_size=2048,
        max_position_embeddings=128, dtype=dtype, quantization=quantization or QuantConfig(),
    )  # fmt: skip


def assert_same_weights(one: CausalLM, other: CausalLM) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert torch.equal(*(tensor.detach().cpu().flatten().view(torch.uint8) for tensor in (a, b))), name


def assert_products(model: CausalLM) -> None:
    """Every weight's plan computes its product on the GPU."""
    for held in matmul_weights(model):
        assert held.weight.is_cuda and held.plan.device == "cuda" and held.plan.layout == "rows"
        for m in (1, 3, 20):
            x = torch.randn(m, held.k, device="cuda").to(held.weight.dtype)
            expected = x.double() @ held.weight.double().t()
            found = held.plan.run(x, held.weight, held.n).double()
            assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dummy_weights_are_those_of_the_cpu(dtype: str) -> None:
    made = LlamaForCausalLM.dummy(config(dtype), "cuda")
    assert made.device == "cuda"
    assert_same_weights(made, LlamaForCausalLM(config(dtype)))
    assert_products(made)


def test_float8_dummy_weights() -> None:
    quantized = config(quantization=QuantConfig(quant_algo=QuantAlgo.FP8, kv_cache_quant_algo=QuantAlgo.FP8))
    assert_same_weights(LlamaForCausalLM.dummy(quantized, "cuda"), LlamaForCausalLM(quantized))


@pytest.mark.parametrize("variant", ["grouped", "biased_tied"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_hugging_face_model_is_read_onto_the_gpu(variant: str, dtype: str) -> None:
    directory = hf_dir("LlamaForCausalLM", variant)
    made = AutoModelForCausalLM.from_hugging_face(directory, dtype=dtype, device="cuda")
    assert all(parameter.is_cuda for parameter in made.parameters())
    assert_same_weights(made, AutoModelForCausalLM.from_hugging_face(directory, dtype=dtype))


def test_a_checkpoint_goes_from_gpu_to_gpu(tmp_path: Path) -> None:
    made = LlamaForCausalLM.dummy(config(), "cuda")
    made.save_checkpoint(tmp_path / "checkpoint")
    read = AutoModelForCausalLM.from_checkpoint(tmp_path / "checkpoint", device="cuda")
    assert read.device == "cuda"
    assert_same_weights(made, read)
    assert_products(read)


def test_a_laid_out_model_moves_and_comes_back() -> None:
    made = LlamaForCausalLM(config("float32"))
    plain = LlamaForCausalLM(config("float32"))
    for held in matmul_weights(made):
        set_parameter(made, held.name, arrange(held.weight, "panel16"))
        held.module.plan = default_plan(torch.float32, held.n, held.k, batch_invariant=True, layout="panel16")
    placement.place(made, "cuda")
    assert_same_weights(made, plain)
    assert_products(made)
    placement.place(made, "cpu")
    assert made.device == "cpu" and {held.plan.device for held in matmul_weights(made)} == {"cpu"}


def test_torch_moves_a_model_too() -> None:
    made = LlamaForCausalLM(config()).to("cuda")
    assert_products(made)
    assert {held.plan.device for held in matmul_weights(made.cpu())} == {"cpu"}


def test_moving_takes_the_memory_of_the_weights_once() -> None:
    made = LlamaForCausalLM(config())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    placement.place(made, "cuda")
    taken = torch.cuda.memory_allocated() - before
    assert made.weight_bytes() <= taken <= made.weight_bytes() + (1 << 20)


def test_more_weights_than_the_gpu_holds() -> None:
    free, _ = free_gpu_bytes()
    vocab_size = 1 + free // 2048  # rows of 2048 bytes, of the embedding alone
    with pytest.raises(OutOfMemoryError, match="GPU has"):
        LlamaForCausalLM.dummy(dataclasses.replace(config(), vocab_size=vocab_size), "cuda")


def test_build_moves_a_model_and_records_the_gpu(tmp_path: Path) -> None:
    model = LlamaForCausalLM(config())
    engine = build(model, QUICK)
    assert engine.device == "cuda" and engine.spec.gpu == gpu_fingerprint() and not engine.spec.cpu
    assert engine.spec.gpu["name"] == torch.cuda.get_device_name()
    assert all(weight.is_cuda for weight in engine.weights().values())
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    assert loaded.check_machine() is None and loaded.spec == engine.spec
    opened = loaded.model()
    assert opened.device == "cuda" and all(weight.is_cuda for weight in loaded.weights().values())
    assert_same_weights(opened, model)
    assert [held.plan for held in matmul_weights(opened)] == [held.plan for held in matmul_weights(model)]
    again = loaded.model()  # shares the memory of the first
    assert [p.data_ptr() for p in again.parameters()] == [p.data_ptr() for p in opened.parameters()]


def test_an_engine_from_another_gpu(tmp_path: Path) -> None:
    engine = build(LlamaForCausalLM.dummy(config(), "cuda"), QUICK)
    spec = dataclasses.replace(engine.spec, gpu={**engine.spec.gpu, "name": "Another GPU", "capability": "8.0"})
    Engine(spec, {0: engine.weights()}).save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    assert "Another GPU" in (loaded.check_machine() or "")
    assert_products(loaded.model())


def test_build_for_the_cpu_takes_a_model_from_the_gpu() -> None:
    engine = build(LlamaForCausalLM.dummy(config(), "cuda"), dataclasses.replace(QUICK, device="cpu"))
    assert engine.device == "cpu" and engine.model().device == "cpu" and not engine.spec.gpu


@pytest.fixture
def no_timings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing was timed before."""
    monkeypatch.setattr(disk_cache, "cache_root", lambda: tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_are_timed_with_the_models_weights(dtype: str, no_timings: None) -> None:
    limits = dataclasses.replace(QUICK, kernel_selection="timed")
    engine = build(LlamaForCausalLM.dummy(config(dtype), "cuda"), limits)
    assert all(record["candidates"] or dtype == "float32" for record in engine.spec.timings)
    for record in engine.spec.timings:
        for candidate in record["candidates"]:
            assert set(candidate["milliseconds"]) == {"1", "4", "16"}
            assert all(0 < ms < 1000 for ms in candidate["milliseconds"].values())
    assert_products(engine.model())
    again = build(LlamaForCausalLM.dummy(config(dtype), "cuda"), limits)
    assert not any(record["candidates"] for record in again.spec.timings)
    assert [record["plan"] for record in again.spec.timings] == [record["plan"] for record in engine.spec.timings]


def test_float8_kernels_are_timed(no_timings: None) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products on this GPU")
    quantized = config(quantization=QuantConfig(quant_algo=QuantAlgo.FP8))
    engine = build(LlamaForCausalLM.dummy(quantized, "cuda"), dataclasses.replace(QUICK, kernel_selection="timed"))
    kinds = {record["dtype"] for record in engine.spec.timings}
    assert kinds == {"float8_e4m3fn", "bfloat16"}
    assert all(record["candidates"] for record in engine.spec.timings)


def test_a_graph_times_what_the_gpu_does() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    one = graph_seconds(lambda: x @ x, 4)
    many = graph_seconds(lambda: x @ x @ x @ x @ x, 4)
    assert 0 < one < many


def test_a_cast_engine_is_cast_on_the_gpu() -> None:
    engine = build(LlamaForCausalLM(config("float32")), dataclasses.replace(QUICK, dtype="bfloat16"))
    assert {weight.dtype for weight in engine.weights().values()} == {torch.bfloat16}
    assert_products(engine.model())
