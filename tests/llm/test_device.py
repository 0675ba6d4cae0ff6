"""LLM(device=...): checked, handed to the build, and compared with what an engine was built for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella import LLM
from lamella.args import LlmArgs
from lamella.loading import open_engine
from lamella_core import device as devices
from lamella_core.engine import BuildConfig
from lamella_core.errors import ConfigError


def test_the_device_is_checked(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="device is 'tpu'; allowed: auto, cpu, cuda"):
        LLM(model_dir, device="tpu")


def test_the_keyword_overrides_the_build_config() -> None:
    config = BuildConfig(device="cuda")
    assert LlmArgs.create(model="m", device="cpu", build_config=config).resolved_build_config().device == "cpu"
    assert LlmArgs.create(model="m", build_config=config).resolved_build_config().device == "cuda"
    assert LlmArgs.create(model="m").resolved_build_config().device == "auto"


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_gpu_that_is_not_there(model_dir: Path, load_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "there is none")
    with pytest.raises(ConfigError, match="device is 'cuda', but there is none"):
        LLM(model_dir, device="cuda", load_format=load_format)


def test_an_engine_runs_where_it_was_built_for(model_dir: Path) -> None:
    engine, _ = open_engine(LlmArgs.create(model=model_dir, device="cpu"))
    assert engine.device == "cpu"
    assert open_engine(LlmArgs.create(model=engine, device="cpu"))[0] is engine
    with pytest.raises(ConfigError, match="device is 'cuda', but the engine was built for 'cpu'.*--device cuda"):
        open_engine(LlmArgs.create(model=engine, device="cuda"))
