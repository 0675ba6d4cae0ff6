"""Tests that need an NVIDIA GPU: all of this folder, run by ``make test-gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests ``gpu``, and skips them where there is none."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def prompts() -> list[list[int]]:
    """Token ids of prompts of different lengths, one of a single token, some longer than a KV block."""
    generator = torch.Generator().manual_seed(7)
    lengths = (11, 1, 17, 33, 5, 40)
    return [torch.randint(3, 131, (length,), generator=generator).tolist() for length in lengths]
