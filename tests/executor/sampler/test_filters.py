"""Filters keep what transformers' warpers keep; draws follow the filtered distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.sampling import make_request
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lamella_core.errors import RequestError
from lamella_executor.sampler import Sampler, SampleRow
from lamella_executor.sampler.filters import Candidates, best_token, filter_logits
from lamella_executor.sampler.random import philox4x64, uniform
from lamella_executor.sampling_params import SamplingParams


def probabilities(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    candidates = filter_logits(scores, params)
    out = torch.zeros(len(scores), dtype=torch.float64)
    ids = torch.arange(len(scores)) if candidates.token_ids is None else candidates.token_ids
    out[ids] = candidates.weights / candidates.weights.sum()
    return out


def reference(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = LogitsProcessorList()
    if params.temperature is not None:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(None, scores.to(torch.float64)[None])[0].softmax(-1)


OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.9},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_k": 0},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 3.0, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 300, "top_p": 0.99},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [0.1, 2.0, 12.0])  # flat (top-p has to sort everything) to peaked
def test_equals_transformers(options: dict[str, float], scale: float) -> None:
    params = SamplingParams(**options)  # type: ignore[arg-type]
    for seed in range(4):
        scores = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) * scale
        scores[seed::5] = -float("inf")
        ours, theirs = probabilities(scores, params), reference(scores, params)
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0]), min_size=1, max_size=60),
    temperature=st.floats(1e-300, 1e6),
    top_k=st.integers(2, 70),
    top_p=st.floats(1e-9, 1.0),
    min_p=st.floats(0.0, 1.0),
    u=st.floats(0.0, 1.0, exclude_max=True),
)
@settings(max_examples=150, deadline=None)
def test_any_parameters_give_an_allowed_token(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, u: float
) -> None:
    """With many ties: something is always left, the best token is in it, and draws come from it."""
    scores = torch.tensor(values)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    candidates = filter_logits(scores, params)
    ids = list(range(len(values))) if candidates.token_ids is None else candidates.token_ids.tolist()
    assert ids == sorted(set(ids))
    assert max(values) in [values[i] for i in ids]
    assert candidates.draw(u) in ids
    limit = max(values.count(min(values[i] for i in ids)) + top_k, 1)
    assert len(ids) <= limit


def test_top_p_takes_the_smallest_set_of_equals() -> None:
    candidates = filter_logits(torch.zeros(1000), SamplingParams(top_p=0.4005))
    assert candidates.token_ids is not None
    assert candidates.token_ids.tolist() == list(range(401))


def test_the_draw_does_not_depend_on_how_the_set_was_found() -> None:
    """A top_k and a top_p that keep every token that is not banned draw what no filter draws."""
    scores = torch.randn(600, generator=torch.Generator().manual_seed(0))
    scores[::6] = -float("inf")
    for step in range(50):
        u = uniform(9, 0, step)
        tokens = {
            filter_logits(scores, SamplingParams(temperature=0.9, top_k=k, top_p=p)).draw(u)
            for k, p in ((0, None), (500, None), (None, 1 - 1e-12), (500, 1 - 1e-12))
        }
        assert len(tokens) == 1


def test_draw_is_the_inverse_of_the_distribution_function() -> None:
    candidates = Candidates(torch.tensor([3, 5, 6, 9]), torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64))
    quantiles = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53, 1.0]
    assert [candidates.draw(u) for u in quantiles] == [3, 3, 6, 6, 9, 9, 9]
    last_is_zero = Candidates(None, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert last_is_zero.draw(1.0) == 0


@pytest.mark.parametrize(
    "scores", [[-float("inf")] * 3, [0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0]], ids=["banned", "nan", "inf"]
)
def test_unusable_scores_raise(scores: list[float]) -> None:
    with pytest.raises(RequestError, match="every token is banned, or a score is NaN"):
        filter_logits(torch.tensor(scores), SamplingParams(top_k=2))
    with pytest.raises(RequestError, match="every token is banned, or a score is NaN"):
        best_token(torch.tensor(scores))


def test_philox_equals_numpy() -> None:
    for counter, key in (((0, 0, 0, 0), (0, 0)), ((7, 2**63, 5, 2**64 - 1), (2**64 - 3, 12345))):
        generator = np.random.Philox(counter=np.array(counter, np.uint64), key=np.array(key, np.uint64))
        total = sum(word << 64 * i for i, word in enumerate(counter)) + 1  # it counts up before each block
        ours = philox4x64(tuple((total >> 64 * i) % 2**64 for i in range(4)), key)  # type: ignore[arg-type]
        assert list(ours) == generator.random_raw(4).tolist()


def test_uniform_is_uniform_in_every_argument() -> None:
    """Chi-square over 32 bins, 31 degrees of freedom: 99.9 % quantile 61.1; and neighbours are uncorrelated."""
    axes = [
        [uniform(seed, 0, 0) for seed in range(4000)],
        [uniform(5, index, 3) for index in range(4000)],
        [uniform(5, 0, position) for position in range(4000)],
        [uniform(-(2**70) - seed, 1, 1) for seed in range(4000)],
    ]
    for values in axes:
        counts = np.histogram(values, bins=32, range=(0, 1))[0]
        assert ((counts - 125) ** 2 / 125).sum() < 61.1
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.06
        assert 0 <= min(values)
        assert max(values) < 1


@pytest.mark.parametrize(
    "options", [{"temperature": 1.3}, {"top_k": 6}, {"top_p": 0.85, "temperature": 0.8}, {"min_p": 0.1}]
)
def test_frequencies_of_sampled_tokens(options: dict[str, float]) -> None:
    """Chi-square of 2000 draws with fixed seeds against the filtered distribution, below its 99.9 % quantile."""
    scores = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    expected = reference(scores, SamplingParams(**options)) * 2000  # type: ignore[arg-type]
    requests = [make_request(seed=seed, **options) for seed in range(2000)]
    logits = scores.repeat(2000, 1)
    results = Sampler(12).sample([SampleRow(request, i) for i, request in enumerate(requests)], logits)
    counts = torch.bincount(torch.tensor([r.continuations[0].token_id for r in results]), minlength=12)
    assert torch.equal(counts[expected == 0], torch.zeros_like(counts[expected == 0]))
    kept = expected >= 5
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}.get(int(kept.sum()) - 1, 31.3)
