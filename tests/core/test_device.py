"""Devices: how one is resolved, what moving a model does, and engines of a GPU on machines with another or none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.reference_context import ReferenceCache, forward_step
from tests.support.tiny_models import hf_dir

from lamella_core import device as devices
from lamella_core import placement
from lamella_core.auto import AutoModelForCausalLM
from lamella_core.checkpoint.layout import arrange, matmul_weights
from lamella_core.engine import BuildConfig, Engine
from lamella_core.engine import engine as engine_module
from lamella_core.engine.checksum import json_checksum
from lamella_core.engine.spec import CHECKSUM_KEY, SCHEMA_VERSION
from lamella_core.errors import ConfigError, OutOfMemoryError
from lamella_core.kernels import gpu_matmul
from lamella_core.kernels.matmul import default_plan, planning_for
from lamella_core.layers.parameter import set_parameter
from lamella_core.models._dummy import fill_dummy
from lamella_core.models.base import CausalLM
from lamella_core.models.llama import LlamaForCausalLM

CPU = BuildConfig(device="cpu")
H100 = {"name": "NVIDIA H100", "capability": "9.0", "driver": "1", "cuda": "12", "torch": "2", "triton": "3"}


def model(variant: str = "grouped", **options: Any) -> CausalLM:
    return LlamaForCausalLM.from_hugging_face(hf_dir("LlamaForCausalLM", variant), **options)


def logits(made: CausalLM) -> torch.Tensor:
    return forward_step(made, ReferenceCache(), {"it": [3, 50, 130, 7]})["it"]


def devices_of_plans(made: CausalLM) -> set[str]:
    return {held.plan.device for held in matmul_weights(made)}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes decisions fall as on a machine with an H100; tensors cannot be put there."""
    monkeypatch.setattr(devices, "why_no_cuda", lambda: None)
    monkeypatch.setattr(devices, "gpu_fingerprint", lambda: H100)
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(gpu_matmul, "capability", lambda: (9, 0))


def test_auto_takes_the_gpu_only_if_it_can_run_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "the reason")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.resolve_device("auto") == devices.resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="the reason; use device='cpu'"):
        devices.resolve_device("cuda")
    monkeypatch.setattr(devices, "why_no_cuda", lambda: None)
    assert devices.resolve_device("auto") == devices.resolve_device("cuda") == "cuda"
    assert devices.resolve_device("cpu") == "cpu"


def test_why_a_gpu_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in (devices.why_no_cuda() or "")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable NVIDIA GPU" in (devices.why_no_cuda() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "Tesla T4 has compute capability 7.5; 8.0" in (devices.why_no_cuda() or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert devices.why_no_cuda() is None


def test_memory_that_torch_keeps_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 30)
    assert devices.free_gpu_bytes() == (30, 100)


def test_models_are_planned_for_the_device_they_are_made_for(a_gpu: None) -> None:
    config = model().config
    assert devices_of_plans(LlamaForCausalLM.empty(config)) == {"cpu"}
    assert devices_of_plans(LlamaForCausalLM.empty(config, "cuda")) == {"cuda"}
    with pytest.raises(ZeroDivisionError), planning_for("cuda"):
        raise ZeroDivisionError
    assert devices_of_plans(LlamaForCausalLM.empty(config)) == {"cpu"}


def test_weights_get_the_kernels_of_the_device_where_they_are(a_gpu: None) -> None:
    reference = model()
    made = LlamaForCausalLM.empty(reference.config, "cuda")
    for name, parameter in reference.named_parameters():
        set_parameter(made, name, parameter.detach())
    assert made.device == "cpu" and devices_of_plans(made) == {"cuda"}
    placement.replan(made)
    assert devices_of_plans(made) == {"cpu"} and torch.equal(logits(made), logits(reference))


def test_moving_to_where_a_model_is_changes_nothing() -> None:
    made = model()
    for held in matmul_weights(made):
        set_parameter(made, held.name, arrange(held.weight, "panel16"))
        held.module.plan = default_plan(torch.float32, held.n, held.k, batch_invariant=True, layout="panel16")
    plans, pointers = [held.plan for held in matmul_weights(made)], [p.data_ptr() for p in made.parameters()]
    calls: list[tuple[int, int]] = []
    placement.place(made, "cpu", lambda done, total: calls.append((done, total)))
    assert [held.plan for held in matmul_weights(made.to("cpu"))] == plans
    assert [p.data_ptr() for p in made.parameters()] == pointers
    assert calls[-1] == (len(pointers), len(pointers))


def test_too_many_weights_for_a_gpu(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_gpu_bytes", lambda: (1000, 2 << 30))
    made = model()
    with pytest.raises(OutOfMemoryError, match=r"GPU has 0\.00 GiB free of 2\.00.*device='cpu'"):
        placement.place(made, "cuda")
    assert made.device == "cpu"
    with pytest.raises(OutOfMemoryError, match="GPU has"):
        LlamaForCausalLM.dummy(made.config, "cuda")
    with pytest.raises(OutOfMemoryError, match="GPU has"):
        model(device="cuda")


def test_dummy_weights_are_those_of_the_plain_constructor() -> None:
    config = model().config
    plain, dummy = LlamaForCausalLM(config), LlamaForCausalLM.dummy(config, "cpu")
    for (name, one), (_, other) in zip(plain.named_parameters(), dummy.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    fill_dummy(dummy)
    assert torch.equal(logits(plain), logits(dummy))


@pytest.mark.parametrize("make", [AutoModelForCausalLM.from_hugging_face, LlamaForCausalLM.from_hugging_face])
def test_the_device_of_a_loaded_model(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = hf_dir("LlamaForCausalLM", "grouped")
    assert make(directory, device="cpu").device == "cpu"
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "there is none")
    for load_format in ("auto", "dummy"):
        with pytest.raises(ConfigError, match="there is none"):
            make(directory, device="cuda", load_format=load_format)


def test_a_checkpoint_on_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model().save_checkpoint(tmp_path / "checkpoint")
    assert AutoModelForCausalLM.from_checkpoint(tmp_path / "checkpoint", device="cpu").device == "cpu"
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "there is none")
    with pytest.raises(ConfigError, match="there is none"):
        AutoModelForCausalLM.from_checkpoint(tmp_path / "checkpoint", device="cuda")


# Engines --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_engine(tmp_path: Path, a_gpu: None) -> Path:
    """An engine directory as a machine with an H100 writes it: plans that were timed there, not the default ones."""
    made = model()
    engine = Engine.from_model(made, CPU)
    plan = {"layout": "rows", "steps": [[None, "cublas"]]}
    spec = dataclasses.replace(
        engine.spec,
        build=dataclasses.replace(engine.spec.build, device="cuda"),
        plans=dict.fromkeys(engine.spec.plans, plan),
        cpu={},
        gpu=H100,
    )
    Engine(spec, {0: engine.weights()}).save(tmp_path / "engine")
    return tmp_path / "engine"


def test_an_engine_says_where_it_runs() -> None:
    engine = Engine.from_model(model(), BuildConfig())
    assert engine.device == engine.spec.build.device == "cpu" and engine.spec.cpu and not engine.spec.gpu


def test_an_engine_has_its_weights_where_it_runs(a_gpu: None) -> None:
    with pytest.raises(ConfigError, match="model is on 'cpu', an engine for 'cuda'.*lamella_builder.build"):
        Engine.from_model(model(), BuildConfig(device="cuda"))


def test_an_engine_of_a_gpu_without_one(gpu_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Engine.load(gpu_engine)
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "there is none")
    for act in (lambda: Engine.load(gpu_engine), opened.model):
        with pytest.raises(ConfigError, match="built for a GPU, but there is none; .*lamella-build --device cpu"):
            act()


def test_an_engine_of_a_cpu_where_there_is_a_gpu(tmp_path: Path, a_gpu: None) -> None:
    made = model()
    Engine.from_model(made, CPU).save(tmp_path / "engine")
    opened = Engine.load(tmp_path / "engine")
    assert opened.device == "cpu" and opened.check_machine() is None
    assert opened.model().device == "cpu" and torch.equal(logits(opened.model()), logits(made))


def opened_elsewhere(directory: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> tuple[Engine, CausalLM]:
    monkeypatch.setattr(devices, "gpu_fingerprint", lambda: {**H100, **changes})
    monkeypatch.setattr(engine_module, "place", lambda made, device: None)  # to where this machine has nothing
    engine = Engine.load(directory)
    return engine, engine.model()


def test_recorded_kernels_run_on_the_same_gpu(gpu_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, made = opened_elsewhere(gpu_engine, monkeypatch, driver="2", torch="3")
    assert engine.check_machine() is None
    assert {held.plan.steps for held in matmul_weights(made)} == {((None, "cublas"),)}


def test_default_kernels_run_on_another_gpu(gpu_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, made = opened_elsewhere(gpu_engine, monkeypatch, name="NVIDIA L4", capability="8.9")
    message = engine.check_machine() or ""
    assert "on another GPU" in message and "NVIDIA L4" in message and "default kernels run" in message
    for held in matmul_weights(made):
        strict = held.weight.dtype == torch.float32
        expected = default_plan(held.weight.dtype, held.n, held.k, batch_invariant=strict, device="cuda")
        assert held.plan == expected


def test_engines_of_the_first_schema_run_on_the_cpu(tmp_path: Path, a_gpu: None) -> None:
    made = model()
    Engine.from_model(made, CPU).save(tmp_path / "engine")
    path = tmp_path / "engine" / "engine.json"
    data = json.loads(path.read_text())
    assert data["schema_version"] == SCHEMA_VERSION == 2
    for key in ("gpu", CHECKSUM_KEY):
        del data[key]
    del data["build"]["device"]
    data["schema_version"] = 1
    path.write_text(json.dumps({**data, CHECKSUM_KEY: json_checksum(data)}))
    opened = Engine.load(tmp_path / "engine")
    assert opened.device == "cpu" and torch.equal(logits(opened.model()), logits(made))
    opened.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "engine.json").read_text())["schema_version"] == 2
