"""Tiny FP8 checkpoints, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.modelopt import write_modelopt
from tests.support.tiny_models import hf_dir


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more threads, and simulated ranks are threads themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of three prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 131, (length,), generator=generator).tolist() for length in (11, 1, 17)]


@pytest.fixture(scope="session")
def modelopt_dir(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]) -> Path:
    """The grouped tiny Llama as a ModelOpt FP8 checkpoint with a float8 KV cache; not to be changed."""
    return write_modelopt(hf_dir("LlamaForCausalLM", "grouped"), tmp_path_factory.mktemp("modelopt"), prompts)


@pytest.fixture
def write(tmp_path: Path, prompts: list[list[int]]) -> Callable[..., Path]:
    """Writes an FP8 checkpoint of a tiny model into a fresh directory; keywords of `write_modelopt`."""

    def write_one(architecture: str = "LlamaForCausalLM", variant: str = "grouped", **options: Any) -> Path:
        return write_modelopt(hf_dir(architecture, variant), tmp_path / "fp8", prompts, **options)

    return write_one
