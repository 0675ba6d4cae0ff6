"""Fixtures of the conformance suite: every test runs for every tiny model of every registered architecture.

All tests of one case run one after the other, so that its models and what they say are made once: tests must not change
the shared model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.reference_context import ReferenceCache, forward_step, greedy
from tests.support.tiny_models import hf_dir as make_hf_dir
from tests.support.tiny_models import hf_model, tiny_cases

from lamella_core.models.registry import get_model_class

NEW_TOKENS = 32


@contextmanager
def single_thread() -> Iterator[None]:
    """Tiny products gain nothing from more threads, and simulated ranks are threads themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="session", params=tiny_cases(), ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(architecture, variant)."""
    return request.param


@pytest.fixture(scope="session")
def hf_dir(case: tuple[str, str]) -> Path:
    """Hugging Face directory of the case."""
    return make_hf_dir(*case)


@pytest.fixture(scope="session")
def model(case: tuple[str, str], hf_dir: Path) -> Any:
    """Our float32 model of the case; not to be changed."""
    return get_model_class(case[0]).from_hugging_face(hf_dir)


@pytest.fixture(scope="session")
def all_prompts() -> list[list[int]]:
    """Token ids of three prompts of different lengths, and of one that begins as the last of them does."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 131, (length,), generator=generator).tolist() for length in (11, 1, 17)]
    return [*prompts, prompts[2][:9] + prompts[0][:3]]


@pytest.fixture(scope="session")
def prompts(all_prompts: list[list[int]]) -> list[list[int]]:
    """Token ids of three prompts of different lengths."""
    return all_prompts[:3]


@pytest.fixture(scope="session")
def oracle_logits(case: tuple[str, str], prompts: list[list[int]]) -> list[torch.Tensor]:
    """What transformers' float32 model says about each of the prompts, [tokens, vocab_size]."""
    oracle = hf_model(*case)
    with torch.no_grad(), single_thread():
        return [oracle(torch.tensor([prompt])).logits[0] for prompt in prompts]


@pytest.fixture(scope="session")
def logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    """What our model says about all tokens of the prompts, all of them in one step; not to be changed."""
    with single_thread():
        return list(forward_step(model, ReferenceCache(), dict(enumerate(prompts))).values())


@pytest.fixture(scope="session")
def greedy_tokens(model: Any, all_prompts: list[list[int]]) -> list[list[int]]:
    """NEW_TOKENS greedy tokens of our model after each of all prompts."""
    with single_thread():
        return greedy(model, all_prompts, NEW_TOKENS)
