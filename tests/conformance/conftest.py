"""Fixtures of the conformance suite: every test runs for every tiny model of every registered architecture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny_models import hf_dir as make_hf_dir
from tests.support.tiny_models import tiny_cases

from lamella_core.models.registry import get_model_class


@pytest.fixture(params=tiny_cases(), ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(architecture, variant)."""
    return request.param


@pytest.fixture
def hf_dir(case: tuple[str, str]) -> Path:
    """Hugging Face directory of the case."""
    return make_hf_dir(*case)


@pytest.fixture
def model(case: tuple[str, str], hf_dir: Path) -> Any:
    """Our float32 model of the case."""
    return get_model_class(case[0]).from_hugging_face(hf_dir)


@pytest.fixture
def prompts() -> list[list[int]]:
    """Token ids of three prompts of different lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 131, (length,), generator=generator).tolist() for length in (11, 1, 17)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more threads, and simulated ranks are threads themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
