"""FP8 models against transformers with every quantized value rounded as it is computed; shards, engines, dummies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.modelopt import simulated_logits
from tests.support.reference_context import ReferenceCache, forward_step, run_ranks
from tests.support.tiny_models import hf_dir

from lamella_core import AutoModelForCausalLM, Engine, Mapping, QuantConfig
from lamella_core.layers.linear import Linear
from lamella_core.models.base import CausalLM

FLOAT8 = torch.float8_e4m3fn
EXACT = 1e-4  # of a logit, where all roundings are the same; logits have a deviation of about 1.5
FLIPPED = 0.02  # mean error where a number lies so near the middle of two that it is rounded the other way
UNLIKE = 0.3  # mean error where all roundings may differ
CASES = [("LlamaForCausalLM", "grouped"), ("LlamaForCausalLM", "biased_tied"), ("LlamaForCausalLM", "wide_heads"),
         ("MistralForCausalLM", "window"), ("Qwen2ForCausalLM", "full")]  # fmt: skip


def logits_of(model: Any, prompts: list[list[int]], **kwargs: Any) -> list[torch.Tensor]:
    return list(forward_step(model, ReferenceCache(), dict(enumerate(prompts)), **kwargs).values())


def assert_same(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Checks logits of several prompts: most are equal, and none is far off."""
    errors = [(a - b).abs() for a, b in zip(ours, expected, strict=True)]
    assert max(error.mean() for error in errors) < FLIPPED
    assert sum(bool(error.max() < EXACT) for error in errors) >= len(errors) - 1


@pytest.mark.parametrize("kv_cache", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_equal_the_simulation(
    case: tuple[str, str], per_channel: bool, kv_cache: bool, write: Callable[..., Path], prompts: list[list[int]]
) -> None:
    source, directory = hf_dir(*case), write(*case, per_channel=per_channel, kv_cache=kv_cache)
    model = AutoModelForCausalLM.from_hugging_face(directory)
    expected = [simulated_logits(source, directory, prompt, dynamic=per_channel) for prompt in prompts]
    assert_same(logits_of(model, prompts), expected)
    plain = logits_of(AutoModelForCausalLM.from_hugging_face(source), prompts)
    assert all((a - b).abs().mean() > 2 * FLIPPED for a, b in zip(plain, expected, strict=True))


def test_dynamic_activations_instead_of_static_ones(modelopt_dir: Path, prompts: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_hugging_face(modelopt_dir, quant_config=QuantConfig(activation_scheme="dynamic"))
    assert not any("activation_scale" in name for name, _ in model.named_parameters())
    source = hf_dir("LlamaForCausalLM", "grouped")
    expected = [simulated_logits(source, modelopt_dir, prompt, dynamic=True) for prompt in prompts]
    assert_same(logits_of(model, prompts), expected)


def test_half_precision_models_are_near(modelopt_dir: Path, prompts: list[list[int]]) -> None:
    full = logits_of(AutoModelForCausalLM.from_hugging_face(modelopt_dir), prompts)
    model = AutoModelForCausalLM.from_hugging_face(modelopt_dir, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32, FLOAT8}
    assert all((a - b).abs().mean() < UNLIKE for a, b in zip(logits_of(model, prompts), full, strict=True))


@pytest.mark.parametrize("algo", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
@pytest.mark.parametrize("case", [CASES[0], ("GPT2LMHeadModel", "tied"), ("MixtralForCausalLM", "top2")], ids="-".join)
def test_wider_weights_are_quantized_as_they_are_read(case: tuple[str, str], algo: str) -> None:
    directory = hf_dir(*case)
    plain = AutoModelForCausalLM.from_hugging_face(directory)
    model = AutoModelForCausalLM.from_hugging_face(directory, quant_config=QuantConfig(algo))
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear) and m.weight.dtype == FLOAT8]
    assert len(linears) == 8
    for name, linear in linears:
        weight, scale = plain.get_parameter(f"{name}.weight"), linear.weight_scale
        dims = (-1,) if algo != "FP8" else (-2, -1)
        assert torch.allclose(scale * 448, weight.abs().amax(dim=dims), rtol=1e-6)
        per_row = scale.reshape(*scale.shape, *[1] * (weight.dim() - scale.dim()))
        assert ((linear.weight.float() * per_row - weight).abs() <= weight.abs() / 16 + per_row * 2**-10).all()
    assert model.weight_bytes() < 0.7 * plain.weight_bytes()
    assert model.config.quantization.has_static_activations is False


def test_uncalibrated_activations_are_dynamic(prompts: list[list[int]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = hf_dir("LlamaForCausalLM", "grouped")
    model = AutoModelForCausalLM.from_hugging_face(source, quant_config=QuantConfig("FP8"))
    assert model.config.quantization == QuantConfig("FP8", activation_scheme="dynamic")
    assert sum("one scale per token" in record.message for record in caplog.records) == 1
    plain = logits_of(AutoModelForCausalLM.from_hugging_face(source), prompts)
    assert all((a - b).abs().mean() < UNLIKE for a, b in zip(logits_of(model, prompts), plain, strict=True))


def check_ranks(
    make: Callable[[Mapping], CausalLM], prompts: list[list[int]], is_dynamic: bool = False, **mapping: int
) -> None:
    """Runs each rank's shard in a thread of its own: same scales, same logits, as one rank has.

    Dynamic scales are those of the part of a token that a rank holds, so roundings differ.
    """
    whole = make(Mapping())

    def work(rank: int, tp: Any) -> list[torch.Tensor]:
        shard = make(Mapping(rank=rank, **mapping))
        for name, parameter in shard.named_parameters():
            if parameter.shape == (own := whole.get_parameter(name)).shape:
                assert torch.equal(parameter, own), name
        return logits_of(shard, prompts, tp=tp)

    expected = logits_of(whole, prompts)
    for rank_logits in run_ranks(mapping["world_size"], work):
        if is_dynamic:
            assert all((a - b).abs().mean() < UNLIKE for a, b in zip(rank_logits, expected, strict=True))
        else:
            assert_same(rank_logits, expected)


@pytest.mark.parametrize("algo", [None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_two_tensor_ranks_equal_one(modelopt_dir: Path, prompts: list[list[int]], algo: str | None) -> None:
    directory = hf_dir("LlamaForCausalLM", "grouped") if algo else modelopt_dir
    config = QuantConfig(algo, "FP8") if algo else None

    def make(mapping: Mapping) -> CausalLM:
        return AutoModelForCausalLM.from_hugging_face(directory, mapping=mapping, quant_config=config)

    check_ranks(make, prompts, is_dynamic=algo is not None, world_size=2, tp_size=2)


@pytest.mark.parametrize(("tp_size", "moe_ep_size"), [(2, 1), (2, 2)])
def test_expert_ranks_equal_one(
    write: Callable[..., Path], prompts: list[list[int]], tp_size: int, moe_ep_size: int
) -> None:
    directory = write("MixtralForCausalLM", "top2")

    def make(mapping: Mapping) -> CausalLM:
        return AutoModelForCausalLM.from_hugging_face(directory, mapping=mapping)

    assert make(Mapping()).get_parameter("layers.0.mlp.experts.down_proj.weight_scale").shape == (4,)
    check_ranks(make, prompts, world_size=tp_size, tp_size=tp_size, moe_ep_size=moe_ep_size)


def test_two_stages_equal_one(modelopt_dir: Path, prompts: list[list[int]]) -> None:
    first, last = (
        AutoModelForCausalLM.from_hugging_face(modelopt_dir, mapping=Mapping(world_size=2, pp_size=2, rank=rank))
        for rank in (0, 1)
    )
    whole = AutoModelForCausalLM.from_hugging_face(modelopt_dir)
    for ours, one in zip(logits_of(first, prompts, stages=[last]), logits_of(whole, prompts), strict=True):
        assert torch.equal(ours, one)


def test_an_expert_is_multiplied_with_its_own_scales(write: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_hugging_face(write("MixtralForCausalLM", "top2"))
    linear = model.get_submodule("layers.1.mlp.experts.down_proj")
    assert linear.input_scale is None and linear.weight_scale.unique().numel() == 4
    x = torch.randn(3, 48)
    for expert in range(4):
        w_scale, x_scale = linear.weight_scale[expert], linear.activation_scale[expert]
        kept = (x / x_scale).clamp(-448, 448).to(FLOAT8).float() * x_scale
        expected = kept @ (linear.weight[expert].float() * w_scale).T
        assert torch.allclose(linear.method.apply(linear, x, None, expert), expected, atol=1e-5)


def test_float8_inputs_are_taken_as_they_are(modelopt_dir: Path) -> None:
    model = AutoModelForCausalLM.from_hugging_face(modelopt_dir, dtype="bfloat16")
    linear = model.get_submodule("layers.0.mlp.gate_up_proj")
    x, scale = torch.randn(4, 32, dtype=torch.bfloat16), linear.input_scale
    assert scale is not None and scale.dtype == torch.float32 and scale.dim() == 0
    quantized = (x.float() / scale).clamp(-448, 448).to(FLOAT8)
    ours = linear.method.apply(linear, quantized, None)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, linear.method.apply(linear, x, None))


def test_saved_and_loaded_models_are_the_same(modelopt_dir: Path, tmp_path: Path, prompts: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_hugging_face(modelopt_dir, dtype="bfloat16")
    expected = logits_of(model, prompts)
    model.save_checkpoint(tmp_path / "checkpoint")
    Engine.from_model(model).save(tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine")
    assert engine.spec.model.quantization == model.config.quantization
    assert engine.weight_bytes() == model.weight_bytes() < 0.8 * 2 * model.num_parameters()
    for again in (AutoModelForCausalLM.from_checkpoint(tmp_path / "checkpoint"), engine.model()):
        assert again.config == model.config
        for name, parameter in model.named_parameters():
            assert parameter.dtype == again.get_parameter(name).dtype
            assert torch.equal(parameter, again.get_parameter(name)), name
        for a, b in zip(logits_of(again, prompts), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("algo", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_dummy_models_multiply_numbers(architecture: str, algo: str, prompts: list[list[int]]) -> None:
    variant = {"LlamaForCausalLM": "grouped", "GPT2LMHeadModel": "tied", "MixtralForCausalLM": "top2"}[architecture]
    model = AutoModelForCausalLM.from_hugging_face(
        hf_dir(architecture, variant), quant_config=QuantConfig(algo, "FP8"), load_format="dummy"
    )
    inputs: list[torch.Tensor] = []
    for name, linear in model.named_modules():
        if isinstance(linear, Linear) and linear.weight.dtype == FLOAT8:
            widest = linear.weight.float().abs().amax() * linear.weight_scale.amax()
            assert 0.9e-3 < widest <= 1.001e-3, name
            assert (linear.input_scale is not None) == (algo == "FP8" and linear.experts is None)
            if linear.input_scale is not None:
                scale = linear.input_scale
                linear.register_forward_pre_hook(lambda _, args, s=scale: inputs.append(args[0].float().abs() / s))
    logits = logits_of(model, prompts)
    assert all(rows.isfinite().all() and rows.abs().max() > 0 for rows in logits)
    assert all(0.01 < x.amax() for x in inputs), "an input is rounded to zero"
    same = type(model)(model.config)
    assert all(torch.equal(p, same.get_parameter(name)) for name, p in model.named_parameters())


def test_another_dtype_leaves_float8_and_scales_alone(modelopt_dir: Path) -> None:
    pytest.importorskip("lamella_builder")
    from lamella_builder import BuildConfig, build

    model = AutoModelForCausalLM.from_hugging_face(modelopt_dir)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == FLOAT8 or p.dim() == 0}
    engine = build(model, BuildConfig(dtype="bfloat16"))
    assert engine.spec.model == dataclasses.replace(model.config, dtype="bfloat16")
    weights = engine.weights()
    assert len(before) == 8 + 16 and all(torch.equal(tensor, weights[name]) for name, tensor in before.items())
    assert weights["norm.weight"].dtype == torch.bfloat16
    assert weights["layers.0.attention.kv_scales"].dtype == torch.float32
    assert engine.spec.plans["layers.0.mlp.down_proj.weight"]["steps"] == [[None, "fp8_upcast"]]
