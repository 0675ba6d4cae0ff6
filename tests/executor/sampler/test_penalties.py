"""Penalties and bans equal transformers' processors or a plain numpy reference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.sampling import make_request, run
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from lamella_core.errors import RequestError
from lamella_executor.sampler import Sampler, SampleRow
from lamella_executor.sampler.penalties import edit_logits, has_edits
from lamella_executor.sequence import RequestState

VOCAB = 40
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


def edited(request: RequestState, scores: torch.Tensor) -> torch.Tensor:
    out = scores.clone()
    edit_logits(out[None], request)
    return out


def request_after(prompt: list[int], output: list[int], **options: Any) -> RequestState:
    request = make_request(prompt, max_tokens=100, **options)
    request.sequences[0].token_ids += output
    return request


def random_scores(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@given(prompt=tokens, output=tokens, penalty=st.floats(0.1, 5.0), size=st.integers(1, 4), least=st.integers(1, 40))
@example(prompt=[9], output=[9], penalty=1.0, size=1, least=1)  # the whole text begins a bad word
@settings(max_examples=80, deadline=None)
def test_equals_transformers(prompt: list[int], output: list[int], penalty: float, size: int, least: int) -> None:
    scores = random_scores(len(prompt))
    ids = torch.tensor([prompt + output])
    bad = [[3], [5, 6], output[-2:] + [9], output[-1:] + [9, 10]]
    request = request_after(
        prompt, output, repetition_penalty=penalty, no_repeat_ngram_size=size, min_tokens=least, end_id=1,
        stop_token_ids=[2, 4], bad_token_ids=[3], bad_words_ids=tuple(map(tuple, bad[1:])),
    )  # fmt: skip
    reference = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(penalty),
        NoRepeatNGramLogitsProcessor(size),
        NoBadWordsLogitsProcessor(bad, eos_token_id=[1]),
        MinNewTokensLengthLogitsProcessor(len(prompt), least, [1, 2, 4]),
    ])  # fmt: skip
    expected = reference(ids, scores[None].clone())[0]
    torch.testing.assert_close(edited(request, scores), expected, rtol=0, atol=0)


@given(prompt=tokens, output=st.lists(st.integers(0, VOCAB - 1), max_size=30))
@settings(max_examples=40, deadline=None)
def test_presence_and_frequency_count_the_output_only(prompt: list[int], output: list[int]) -> None:
    scores = random_scores(len(output))
    expected = scores.numpy().astype(np.float64)
    for token, count in Counter(output).items():
        expected[token] -= 0.4 * count + 0.7
    request = request_after(prompt, output, frequency_penalty=0.4, presence_penalty=0.7)
    np.testing.assert_allclose(edited(request, scores).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_single_edits_apply_in_the_documented_order() -> None:
    """A processor comes last: it sees the bias and the bans, and may undo them."""
    seen: list[torch.Tensor] = []

    def processor(req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream: None, client: None) -> None:
        assert (req_id, token_ids, stream, client) == (17, [[1, 7, 7]], None, None)
        seen.append(logits.clone())
        logits[..., 3] = 50.0

    bias = torch.zeros(VOCAB)
    bias[5], bias[6] = 2.5, -float("inf")
    request = request_after(
        [1],
        [7, 7],
        request_id=17,
        embedding_bias=bias,
        bad_token_ids=[3],
        frequency_penalty=1.0,
        logits_processor=processor,
    )
    bias.fill_(99.0)  # the request holds its own copy
    out = edited(request, torch.zeros(VOCAB))
    [logits] = seen
    assert logits.shape == (1, 1, VOCAB)
    assert logits[0, 0, [3, 5, 6, 7]].tolist() == [-float("inf"), 2.5, -float("inf"), -2.0]
    assert out[[3, 5, 6, 7]].tolist() == [50.0, 2.5, -float("inf"), -2.0]


def test_has_edits_only_while_there_are_any() -> None:
    assert not has_edits(request_after([1], [2]))
    assert has_edits(request_after([1], [2], min_tokens=2))
    assert not has_edits(request_after([1], [2, 3], min_tokens=2))
    assert has_edits(request_after([1], [2], bad_words_ids=((4, 5),)))


def test_min_tokens_delays_every_end() -> None:
    """The end token is always the best one; the output has exactly min_tokens others."""
    row = torch.zeros(VOCAB)
    row[:4] = torch.tensor([1.0, 9.0, 8.0, 7.0])  # 1: end_id, 2: extra end, 3: stop token
    for least in (0, 1, 5):
        request = make_request(end_id=1, extra_end_ids=(2,), stop_token_ids=[3], min_tokens=least)
        [output] = run(request, lambda ids: row.repeat(len(ids), 1))
        assert output.output_ids == [0] * least
        assert (output.finish_reason, output.stop_reason) == ("stop", None)


class Explosive:
    def __call__(self, *arguments: object) -> None:
        raise KeyError("boom")


def failing_function(*arguments: object) -> None:
    raise ValueError("no such token")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (Explosive(), "logits processor Explosive raised KeyError: 'boom'"),
        (failing_function, "failing_function raised"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"use_beam_search": True, "n": 2}])
def test_a_raising_processor_fails_its_request_only(processor: Any, message: str, options: dict[str, Any]) -> None:
    rows = [
        SampleRow(make_request(logits_processor=processor, **options), 0),
        SampleRow(make_request(logits_processor=lambda i, logits, *rest: logits[..., 4].fill_(99.0)), 1),
        SampleRow(make_request(), 2),
    ]
    logits = torch.randn(3, VOCAB)
    expected = int(logits[2].argmax())
    failed, edited_one, plain = Sampler(VOCAB).sample(rows, logits)
    assert isinstance(failed.error, RequestError)
    assert message in str(failed.error)
    assert isinstance(failed.error.__cause__, KeyError | ValueError)
    assert failed.continuations == []
    assert edited_one.continuations[0].token_id == 4
    assert plain.continuations[0].token_id == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 3}, {"use_beam_search": True, "n": 2}])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_processor_that_makes_nan_fails_its_request(options: dict[str, Any], poison: float) -> None:
    request = make_request(logits_processor=lambda i, logits, *rest: logits[..., 4].fill_(poison), **options)
    [result] = Sampler(VOCAB).sample([SampleRow(request, 0)], torch.randn(1, VOCAB))
    assert isinstance(result.error, RequestError)
    assert "score is NaN" in str(result.error)
