"""build(): the same results as the model, for every model; dtype, limits, memory, other ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.support.reference_context import ReferenceCache, forward_step
from tests.support.tiny_models import hf_dir, tiny_cases

from lamella_builder import BuildConfig, build
from lamella_builder.steps import memory
from lamella_core.checkpoint.layout import matmul_weights
from lamella_core.checkpoint.native import plain_weights
from lamella_core.engine import Engine, EngineWriter
from lamella_core.errors import ConfigError, OutOfMemoryError
from lamella_core.mapping import Mapping
from lamella_core.models.base import CausalLM
from lamella_core.models.llama import LlamaForCausalLM
from lamella_core.models.registry import get_model_class

PROMPTS = {"a": [3, 50, 130, 7, 9], "b": [101]}
QUICK = BuildConfig(kernel_selection="default")


def logits(model: CausalLM) -> torch.Tensor:
    return torch.cat(list(forward_step(model, ReferenceCache(), PROMPTS).values()))


def llama(**kwargs: object) -> CausalLM:
    return LlamaForCausalLM.from_hugging_face(hf_dir("LlamaForCausalLM", "grouped"), **kwargs)


@pytest.mark.parametrize(("architecture", "variant"), tiny_cases(), ids=["-".join(case) for case in tiny_cases()])
def test_checkpoint_build_save_load_gives_the_same_logits(architecture: str, variant: str, tmp_path: Path) -> None:
    model_class = get_model_class(architecture)
    model = model_class.from_hugging_face(hf_dir(architecture, variant))
    expected = logits(model)
    model.save_checkpoint(tmp_path / "checkpoint")
    converted = model_class.from_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(logits(converted), expected)
    build(converted).save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine").model()
    assert torch.allclose(logits(loaded), expected, atol=2e-5)
    assert torch.equal(logits(loaded), logits(converted))  # bit by bit what the built model in memory gives


def test_the_model_stays_usable_and_may_be_built_again() -> None:
    model, plain = llama(), llama()
    first = build(model, QUICK)
    assert torch.allclose(logits(model), logits(plain), atol=2e-5)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert [parameter.data_ptr() for parameter in first.model().parameters()] == pointers
    second = build(model, QUICK)
    assert second.spec.plans == first.spec.plans
    for name, parameter in plain.named_parameters():
        assert torch.equal(plain_weights(model)[name], parameter)
    assert torch.equal(logits(first.model()), logits(second.model()))


def test_a_laid_out_model_is_saved_as_a_checkpoint_in_the_plain_layout(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    build(model, QUICK)
    model.save_checkpoint(tmp_path)
    back = dict(LlamaForCausalLM.from_checkpoint(tmp_path).named_parameters())
    assert all(torch.equal(back[name], parameter) for name, parameter in plain.named_parameters())


def test_casting_moves_the_weights(tmp_path: Path) -> None:
    model = llama()
    engine = build(model, BuildConfig(dtype="bfloat16", kernel_selection="default"))
    assert engine.spec.model.dtype == engine.spec.build.dtype == "bfloat16"
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = plain_weights(llama(dtype="bfloat16"))
    found = plain_weights(engine.model())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    engine.save(tmp_path / "engine")
    assert Engine.load(tmp_path / "engine").spec == engine.spec


def test_a_model_whose_weights_moved_away_is_not_built_again() -> None:
    model = llama()
    build(model, BuildConfig(dtype="bfloat16", kernel_selection="default"))
    with pytest.raises(ConfigError, match="the model has no weights .* load it again"):
        build(model, BuildConfig(kernel_selection="default"))


def test_the_spec_records_limits_steps_and_choices() -> None:
    calls: list[tuple[str, int, int]] = []
    engine = build(llama(), BuildConfig(max_seq_len=32, max_batch_size=4), progress=lambda *call: calls.append(call))
    spec = engine.spec
    assert spec.build.max_seq_len == 32 and spec.build.max_input_len == 31
    steps = ["resolve limits", "plan memory", "move weights", "cast", "choose kernels", "lay out weights"]
    assert list(spec.step_seconds) == steps and all(seconds >= 0 for seconds in spec.step_seconds.values())
    assert list(dict.fromkeys(name for name, _, _ in calls)) == steps
    for step in steps:
        first, *_, last = [(done, total) for name, done, total in calls if name == step]
        assert first[0] == 0 and last[0] == last[1]
    assert spec.plans.keys() == {held.name for held in matmul_weights(engine.model())}
    assert sum(record["count"] for record in spec.timings) == len(spec.plans)
    assert spec.cpu["threads"] >= 1 and engine.check_machine() is None


def test_an_untied_embedding_keeps_its_rows_and_a_tied_one_is_laid_out() -> None:
    untied, tied = llama(), LlamaForCausalLM.from_hugging_face(hf_dir("LlamaForCausalLM", "biased_tied"))
    before = untied.embed_tokens.weight.clone()
    assert "embed_tokens.weight" not in build(untied, QUICK).spec.plans
    assert torch.equal(untied.embed_tokens.weight, before)
    assert "embed_tokens.weight" in build(tied, QUICK).spec.plans


def test_other_ranks_take_over_the_choices(tmp_path: Path) -> None:
    spec = None
    with EngineWriter(tmp_path / "engine") as writer:
        for rank in range(2):
            engine = build(llama(mapping=Mapping(world_size=2, tp_size=2, rank=rank)), like=spec)
            if spec is not None:
                assert engine.spec.plans == spec.plans
            spec = spec or engine.spec
            writer.add_rank(rank, engine.spec, engine.weights(rank))
    assert [Engine.load(tmp_path / "engine", rank).ranks for rank in range(2)] == [[0], [1]]


def test_limits_that_the_model_rules_out() -> None:
    with pytest.raises(ConfigError, match="max_seq_len 65 exceeds the model's 64 positions"):
        build(llama(), BuildConfig(max_seq_len=65))


def test_what_does_not_fit_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    plans = [held.plan for held in matmul_weights(model)]
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    with pytest.raises(
        OutOfMemoryError, match=r"running takes at least .* GiB: .* 1\.00 GiB are free\. Lower max_seq_len"
    ):
        build(model, BuildConfig(max_num_tokens=10**8))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(OutOfMemoryError, match=r"building takes .* choose a smaller dtype, raise tp_size"):
        build(model)
    assert [held.plan for held in matmul_weights(model)] == plans


def test_the_memory_plan_counts_what_models_hold() -> None:
    model = llama()
    config = dataclasses.replace(model.config, mapping=Mapping(world_size=2, pp_size=2))
    plan = memory.plan_memory(model.config, BuildConfig(max_batch_size=3, max_beam_width=2, max_seq_len=40))
    assert plan.weight_bytes == (model.weight_bytes(),)
    assert plan.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes
    assert plan.kv_tokens_wanted == 3 * 2 * 40 and plan.kv_tokens_least == 40 * 2
    half = memory.plan_memory(model.config, BuildConfig(dtype="bfloat16", kv_cache_type="disabled"))
    assert half.weight_bytes[0] * 2 == plan.weight_bytes[0] and half.kv_bytes_per_token == 0
    assert half.kv_tokens_least == 32  # one block: nobody asked for requests of max_position_embeddings
    stages = memory.plan_memory(config, BuildConfig())
    assert len(stages.weight_bytes) == 2 and sum(stages.weight_bytes) == plan.weight_bytes[0]
    assert stages.kv_bytes_per_token * 2 == plan.kv_bytes_per_token


def test_a_sliding_window_bounds_what_one_request_keeps() -> None:
    config = LlamaForCausalLM.from_hugging_face(hf_dir("LlamaForCausalLM", "grouped")).config
    mistral = get_model_class("MistralForCausalLM").from_hugging_face(hf_dir("MistralForCausalLM", "window")).config
    wanted = BuildConfig(max_seq_len=40)
    assert memory.plan_memory(mistral, wanted).kv_tokens_least == 6
    assert memory.plan_memory(config, wanted).kv_tokens_least == 40


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0.00 KiB"), (2048, "2.00 KiB"), (1 << 20, "1.00 MiB"), (3 << 29, "1.50 GiB")]
)
def test_sizes_are_for_people(num_bytes: int, text: str) -> None:
    assert memory.format_bytes(num_bytes) in {text, f"{num_bytes} bytes"}
