"""SamplingParams: what is accepted and normalized, and that every mistake names its field."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella_core.errors import RequestError
from lamella_executor.sampling_params import SamplingParams

NAN, INF = float("nan"), float("inf")

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2.5), ("max_tokens", "9"), ("max_tokens", True),
    ("min_tokens", -1), ("n", 0), ("n", 129), ("best_of", 0), ("best_of", 1000), ("top_k", -1), ("top_k", 1.0),
    ("temperature", NAN), ("temperature", INF), ("temperature", -0.1), ("temperature", "hot"), ("temperature", True),
    ("top_p", 1.01), ("top_p", -0.01), ("top_p", NAN), ("min_p", 2), ("min_p", NAN),
    ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", INF),
    ("presence_penalty", NAN), ("frequency_penalty", INF), ("no_repeat_ngram_size", -2),
    ("seed", 1.5), ("end_id", -2), ("truncate_prompt_tokens", 0), ("logprobs", -1), ("logprobs", 101),
    ("prompt_logprobs", 10_000), ("ignore_eos", "false"), ("detokenize", 1), ("use_beam_search", "yes"),
    ("stop", [""]), ("stop", [3]), ("stop", ["x" * 257]), ("stop", ["x"] * 10_000), ("stop", 3.5), ("stop", b"x"),
    ("bad", [None]), ("stop_token_ids", ["a"]), ("stop_token_ids", [True]), ("stop_token_ids", [-1]),
    ("stop_token_ids", list(range(65))), ("bad_token_ids", [1.0]), ("bad_token_ids", list(range(1025))),
    ("logits_processor", 3), ("logits_processor", ["x"]), ("early_stopping", "always"), ("length_penalty", NAN),
    ("embedding_bias", torch.zeros(2, 3)), ("embedding_bias", torch.tensor([NAN])),
    ("embedding_bias", torch.tensor([INF])), ("embedding_bias", "heavy"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=lambda v: str(v)[:20])
def test_a_bad_value_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"SamplingParams\.{name} ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 400


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5; it exceeds max_tokens 4"),
    ({"n": 3, "best_of": 2, "temperature": 1.0}, r"best_of is 2; it must be at least n \(3\)"),
    ({"n": 2}, "n=2, best_of=None with greedy decoding"),
    ({"best_of": 4}, "n=1, best_of=4 with greedy decoding"),
    ({"n": 2, "temperature": 0.0}, "with greedy decoding"),
    ({"n": 2, "temperature": 0.0, "top_p": 0.9}, "with greedy decoding"),
    ({"n": 2, "top_k": 1}, "with greedy decoding"),
    ({"n": 2, "top_p": 0.0}, "with greedy decoding"),
    ({"stop": "x", "detokenize": False}, "stop strings are found in the text"),
    ({"use_beam_search": True, "n": 9}, "n is 9; beams: at most 8"),
    ({"use_beam_search": True, "best_of": 16}, "best_of is 16; beams: at most 8"),
    ({"use_beam_search": True, "n": 2, "temperature": 0.7}, "temperature is 0.7; beam search does not sample"),
    ({"use_beam_search": True, "n": 2, "top_k": 5}, "top_k is 5; beam search does not sample"),
    ({"use_beam_search": True, "n": 2, "top_p": 0.5}, "top_p is 0.5; beam search does not sample"),
    ({"use_beam_search": True, "n": 2, "min_p": 0.5}, "min_p is 0.5; beam search does not sample"),
    ({"beam_search_diversity_rate": 0.5}, "beam_search_diversity_rate is 0.5; it needs use_beam_search=True"),
    ({"early_stopping": "never"}, "early_stopping is 'never'; it needs use_beam_search=True"),
    ({"length_penalty": 2.0}, "length_penalty is 2.0; it needs use_beam_search=True"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS, ids=lambda v: str(v)[:40])
def test_contradictions_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_lists_numbers_and_flags_are_normalized() -> None:
    params = SamplingParams(
        stop="x", stop_token_ids=np.array([3, 4]), bad="y", bad_token_ids=7, logits_processor=print,
        temperature=np.float32(0.5), top_k=np.int64(4), top_p=1, logprobs=True, prompt_logprobs=False,
    )  # type: ignore[arg-type]  # fmt: skip
    assert (params.stop, params.stop_token_ids, params.bad, params.bad_token_ids) == (("x",), (3, 4), ("y",), (7,))
    assert (params.stop_strings, params.stop_ids, params.bad_ids) == (("x",), {3, 4}, (7,))
    assert params.processors == (print,)
    values = (params.temperature, params.top_k, params.top_p, params.logprobs, params.prompt_logprobs)
    assert values == (0.5, 4, 1.0, 1, None)
    assert [type(value) for value in values] == [float, int, float, int, type(None)]
    assert SamplingParams(use_beam_search=True, early_stopping=1).early_stopping is True  # type: ignore[arg-type]


def test_none_stands_for_the_default() -> None:
    nothing = {field.name: None for field in dataclasses.fields(SamplingParams)}
    assert SamplingParams(**nothing) == SamplingParams()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "is_greedy"),
    [
        ({}, True), ({"seed": 3}, True), ({"repetition_penalty": 1.5}, True), ({"temperature": 0}, True),
        ({"temperature": 0.0, "top_p": 0.9, "top_k": 50}, True), ({"top_k": 1, "temperature": 2.0}, True),
        ({"top_p": 0.0}, True), ({"temperature": 1.0}, False), ({"top_k": 50}, False), ({"top_k": 0}, False),
        ({"top_p": 1.0}, False), ({"min_p": 0.1}, False), ({"use_beam_search": True}, False),
    ],
)  # fmt: skip
def test_when_decoding_is_greedy(options: dict[str, Any], is_greedy: bool) -> None:
    assert SamplingParams(**options).is_greedy is is_greedy


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 0}, {"min_tokens": 1}, {"presence_penalty": 0.1}, {"bad_token_ids": [3]}, {"top_k": 4},
        {"embedding_bias": torch.zeros(4)}, {"logits_processor": print}, {"no_repeat_ngram_size": 3},
    ],
)  # fmt: skip
def test_what_leaves_the_greedy_fast_path(options: dict[str, Any]) -> None:
    assert SamplingParams(stop="x", seed=1).is_plain_greedy
    assert not SamplingParams(**options).is_plain_greedy


def test_it_is_frozen_and_replace_checks_again() -> None:
    params = SamplingParams(temperature=0.5, n=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3  # type: ignore[misc]
    assert params.replace(n=4).width == 4
    assert params.replace(temperature=0.0, n=1).is_greedy
    with pytest.raises(RequestError, match="greedy"):
        params.replace(temperature=None)
    assert repr(params) == "SamplingParams(n=2, temperature=0.5)"


names = st.sampled_from([field.name for field in dataclasses.fields(SamplingParams)])
lists = st.lists(st.one_of(st.integers(-1, 5), st.text(max_size=2)), max_size=3)
anything = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=3), lists)


@given(options=st.dictionaries(names, anything, max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_values_either_work_or_raise_a_request_error(options: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**options)
    except RequestError as error:
        assert str(error).startswith("SamplingParams")
        return
    assert params.width >= params.n
    assert params.replace() == params


def test_equal_biases_make_equal_params() -> None:
    bias = torch.tensor([0.0, -1.0])
    assert SamplingParams(embedding_bias=bias) == SamplingParams(embedding_bias=bias.clone())
    assert SamplingParams(embedding_bias=bias) != SamplingParams(embedding_bias=bias + 1)
    assert SamplingParams(embedding_bias=bias) != SamplingParams()
    with pytest.raises(RequestError, match="embedding_bias"):
        SamplingParams(embedding_bias=[])


def test_equal_params_have_equal_hashes():
    first, second = (SamplingParams(stop=["a"], embedding_bias=torch.ones(3)) for _ in range(2))
    assert first == second
    assert len({first, second, SamplingParams(stop=["b"])}) == 2
