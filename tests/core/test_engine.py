"""Engine: in memory, saved, loaded; plans, CPUs, ranks and the checksum."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.reference_context import ReferenceCache, forward_step
from tests.support.tiny_models import hf_dir

from lamella_core.checkpoint.layout import arrange, matmul_weights
from lamella_core.engine import BuildConfig, Engine, EngineSpec, EngineWriter
from lamella_core.engine.checksum import tensor_checksum
from lamella_core.errors import ConfigError, EngineFormatError
from lamella_core.kernels.matmul import default_plan
from lamella_core.layers.parameter import set_parameter
from lamella_core.mapping import Mapping
from lamella_core.models.base import CausalLM
from lamella_core.models.llama import LlamaForCausalLM

PROMPT = {"it": [3, 50, 130, 7]}


@pytest.fixture
def model() -> CausalLM:
    """A model whose weights lie in another layout than the plain one."""
    made = LlamaForCausalLM.from_hugging_face(hf_dir("LlamaForCausalLM", "biased_tied"))
    for held in matmul_weights(made):
        set_parameter(made, held.name, arrange(held.weight, "panel16"))
        held.module.plan = default_plan(torch.float32, held.n, held.k, batch_invariant=True, layout="panel16")
    return made


def logits(model: CausalLM) -> torch.Tensor:
    return forward_step(model, ReferenceCache(), PROMPT)["it"]


def test_in_memory_saved_and_loaded_engines_run_the_same(model: CausalLM, tmp_path: Path) -> None:
    plain = LlamaForCausalLM.from_hugging_face(hf_dir("LlamaForCausalLM", "biased_tied"))
    engine = Engine.from_model(model, BuildConfig(max_seq_len=32))
    assert engine.world_size == 1 and engine.ranks == [0] and engine.directory is None
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    assert loaded.spec == engine.spec and loaded.directory == tmp_path / "engine"
    expected = logits(plain)
    assert torch.allclose(logits(model), expected, atol=2e-5)
    for other in (engine.model(), loaded.model(), Engine.from_dir(str(tmp_path / "engine"), verify=False).model()):
        assert torch.equal(logits(other), logits(model))


def test_models_of_an_engine_share_its_memory(model: CausalLM) -> None:
    engine = Engine.from_model(model)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert [parameter.data_ptr() for parameter in engine.model().parameters()] == pointers
    assert engine.weight_bytes() == model.weight_bytes()
    assert [held.plan for held in matmul_weights(engine.model())] == [held.plan for held in matmul_weights(model)]


def test_the_spec_survives_json(model: CausalLM) -> None:
    spec = Engine.from_model(model, timings=({"n": 1},), step_seconds={"cast": 0.5}).spec
    assert EngineSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_tokenizer_files_are_copied(model: CausalLM, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors", "modeling_x.py"):
        (source / name).write_text("{}")
    engine = Engine.from_model(model, tokenizer_dir=source)
    engine.save(tmp_path / "engine")
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert names == {"engine.json", "rank0.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"}
    again = Engine.load(tmp_path / "engine")
    assert again.tokenizer_dir == tmp_path / "engine"
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").exists()
    Engine.from_model(model).save(tmp_path / "bare")
    assert Engine.load(tmp_path / "bare").tokenizer_dir is None


def test_an_engine_can_be_saved_over_itself(model: CausalLM, tmp_path: Path) -> None:
    Engine.from_model(model).save(tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine")
    before = logits(engine.model())
    engine.save(tmp_path / "engine")
    assert torch.equal(logits(engine.model()), before)  # still mapped from the replaced file
    assert torch.equal(logits(Engine.load(tmp_path / "engine").model()), before)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_another_cpu_is_noticed_and_gets_default_kernels(model: CausalLM) -> None:
    engine = Engine.from_model(model)
    assert engine.check_machine() is None
    name = next(iter(engine.spec.plans))
    plans = {**engine.spec.plans, name: {"layout": "panel16", "steps": [[None, "kernel_of_elsewhere"]]}}
    cpu = {**engine.spec.cpu, "model": "Other CPU", "flags": "abc"}
    elsewhere = Engine(dataclasses.replace(engine.spec, cpu=cpu, plans=plans), {0: engine.weights()})
    message = elsewhere.check_machine()
    assert message is not None and "'Other CPU'" in message and "default kernels" in message
    assert torch.allclose(logits(elsewhere.model()), logits(model), atol=2e-5)


def test_other_native_kernels_are_not_called_another_cpu(model: CausalLM) -> None:
    engine = Engine.from_model(model)
    older = dataclasses.replace(engine.spec, cpu={**engine.spec.cpu, "native": "older"})
    message = Engine(older, {0: engine.weights()}).check_machine()
    assert message is not None and "another set of native kernels" in message and "another CPU" not in message


def test_threads_and_torch_version_do_not_make_another_cpu(model: CausalLM) -> None:
    engine = Engine.from_model(model)
    cpu = {**engine.spec.cpu, "threads": 999, "torch": "0.0"}
    assert Engine(dataclasses.replace(engine.spec, cpu=cpu), {0: engine.weights()}).check_machine() is None


def test_an_unknown_kernel_falls_back_with_a_warning(model: CausalLM, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine.from_model(model)
    name = next(iter(engine.spec.plans))
    plans = {**engine.spec.plans, name: {"layout": "panel16", "steps": [[None, "native_panelz"]]}}
    with caplog.at_level(logging.WARNING):
        other = Engine(dataclasses.replace(engine.spec, plans=plans), {0: engine.weights()}).model()
    assert "native_panelz" in caplog.text
    assert torch.equal(logits(other), logits(model))


def test_an_unknown_layout_is_an_error(model: CausalLM) -> None:
    engine = Engine.from_model(model)
    name = next(iter(engine.spec.plans))
    plans = {**engine.spec.plans, name: {"layout": "spiral", "steps": [[None, "native_panels"]]}}
    with pytest.raises(EngineFormatError, match=r"'spiral'.*build it again"):
        Engine(dataclasses.replace(engine.spec, plans=plans), {0: engine.weights()}).model()


def ranks_of(directory: Path, world: int, **sizes: int) -> list[CausalLM]:
    return [
        LlamaForCausalLM.from_hugging_face(directory, mapping=Mapping(world_size=world, rank=rank, **sizes))
        for rank in range(world)
    ]


def test_ranks_are_written_one_after_another(tmp_path: Path) -> None:
    models = ranks_of(hf_dir("LlamaForCausalLM", "grouped"), 4, tp_size=2, pp_size=2)
    with EngineWriter(tmp_path / "engine") as writer:
        for rank, model in enumerate(models):
            engine = Engine.from_model(model)
            writer.add_rank(rank, engine.spec, engine.weights(rank))
    for rank, model in enumerate(models):
        engine = Engine.load(tmp_path / "engine", rank)
        assert engine.ranks == [rank] and engine.world_size == 4 and engine.spec.model.mapping.rank == rank
        weights = dict(engine.model(rank).named_parameters())
        assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(ConfigError, match=r"4 ranks \(tp_size 2 x pp_size 2\).*there is 1.*--tp_size 1"):
        engine.check_processes(1)
    engine.check_processes(4)
    with pytest.raises(EngineFormatError, match=r"rank 0 is not held.*Engine\.load\(directory, rank=0\)"):
        engine.model(0)
    with pytest.raises(EngineFormatError, match="there is no rank 4"):
        Engine.load(tmp_path / "engine", 4)


def test_missing_ranks_and_other_kernels_are_refused(tmp_path: Path) -> None:
    engines = [Engine.from_model(m) for m in ranks_of(hf_dir("LlamaForCausalLM", "grouped"), 2, tp_size=2)]
    with pytest.raises(EngineFormatError, match=r"\[1\] were not written"):
        engines[0].save(tmp_path / "engine")
    other = {name: {"layout": "panel16", "steps": [[None, "native_panels"]]} for name in engines[1].spec.plans}
    with pytest.raises(EngineFormatError, match="other kernels"), EngineWriter(tmp_path / "engine") as writer:
        writer.add_rank(0, engines[0].spec, engines[0].weights(0))
        writer.add_rank(1, dataclasses.replace(engines[1].spec, plans=other), engines[1].weights(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 7, 1023, 1024, 1025, 5000, (1 << 16) * 1024 + 3])
def test_the_checksum_sees_every_kind_of_damage(size: int) -> None:
    tensor = torch.arange(size, dtype=torch.int64).mul_(2654435761).bitwise_right_shift_(7).to(torch.uint8)
    good = tensor_checksum(tensor)
    assert good == tensor_checksum(tensor.clone()) and len(good) == 16
    assert tensor_checksum(torch.cat([tensor, torch.zeros(1, dtype=torch.uint8)])) != good
    changes: list[Any] = [lambda t, at=at: t[at].bitwise_xor_(1) for at in {0, size // 2, size - 1} if 0 <= at < size]
    if size >= 2048:
        changes += [lambda t: t[:2048].copy_(t[:2048].roll(1024)), lambda t: t[:1024].zero_()]
    for change in changes:
        damaged = tensor.clone()
        change(damaged)
        assert tensor_checksum(damaged) != good


def test_the_checksum_reads_bytes_whatever_the_dtype_and_strides() -> None:
    tensor = torch.linspace(-3, 3, 700).to(torch.bfloat16)
    raw = tensor.view(torch.uint8)
    assert tensor_checksum(tensor) == tensor_checksum(raw) == tensor_checksum(raw.view(torch.int16).reshape(2, 350))
    turned = tensor.reshape(35, 20).t()
    assert tensor_checksum(turned) == tensor_checksum(turned.contiguous())
    assert tensor_checksum(torch.cat([raw[:1], raw])[1:]) == tensor_checksum(tensor)  # starts at an odd address
