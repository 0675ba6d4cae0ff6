"""Fixtures of the facade's tests: one tiny random Llama with a real tokenizer, loaded once per file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.text_models import text_model_dir

from lamella import LLM


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return text_model_dir()


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    with LLM(model_dir, max_batch_size=16, max_beam_width=4) as llm:
        yield llm
