"""The sampler as a whole: batches, determinism, log-probabilities, bad logits, which outputs are returned."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.sampling import advance, make_request, run

from lamella_core.errors import RequestError
from lamella_executor.sampler import Sampler, SampleRow, prompt_logprobs, select_outputs
from lamella_executor.sampler.logprobs import top_logprobs
from lamella_executor.sequence import RequestState

VOCAB = 97


def logits_of(token_ids: list[list[int]]) -> torch.Tensor:
    """A fixed random function of the last three tokens."""
    rows = []
    for ids in token_ids:
        generator = torch.Generator().manual_seed(sum((t + 1) * 1009**i for i, t in enumerate(ids[-3:])))
        rows.append(torch.randn(VOCAB, generator=generator) * 2)
    return torch.stack(rows)


KINDS: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"temperature": 0.8, "seed": 11, "logprobs": 0},
    {"temperature": 1.2, "top_k": 20, "seed": 5},
    {"top_p": 0.7, "seed": 2**80 + 3, "n": 3, "logprobs": 2},
    {"temperature": 1.0, "min_p": 0.05, "seed": -4, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"no_repeat_ngram_size": 2, "min_tokens": 6, "end_id": 4},
    {"use_beam_search": True, "n": 2, "best_of": 4, "end_id": 9, "logprobs": 1},
    {"use_beam_search": True, "n": 3, "beam_search_diversity_rate": 0.5, "end_id": 9, "repetition_penalty": 1.2},
    {"temperature": 1.1, "n": 2, "best_of": 4, "seed": 8},
]


def requests(kinds: list[dict[str, Any]]) -> list[RequestState]:
    return [make_request([1, i % 5], request_id=i, max_tokens=8, **kind) for i, kind in enumerate(kinds)]


def trace(request: RequestState) -> list[Any]:
    return [
        (s.output_ids, s.cumulative_logprob, s.logprobs, s.finish_reason, s.stop_reason)
        for s in select_outputs(request)
    ]


def run_together(batch: list[RequestState], shuffle: random.Random, padding: int = 0) -> None:
    """Steps all requests, in random row order, some steps without some of them (as if paused); extra rows between."""
    while live := [request for request in batch if request.sequences]:
        live = [request for request in live if shuffle.random() < 0.8]
        shuffle.shuffle(live)
        rows, parts, start = [], [], 0
        for request in live:
            part = logits_of([s.token_ids for s in request.sequences])
            parts += [torch.full((padding, VOCAB), float("nan")), part]
            rows.append(SampleRow(request, start + padding))
            start += padding + len(part)
        if rows:
            for request, result in zip(live, Sampler(VOCAB).sample(rows, torch.cat(parts)), strict=True):
                advance(request, result)


def test_alone_equals_among_others() -> None:
    """Tokens, log-probabilities and scores are bitwise equal, alone and among 45 others in any order, with pauses."""
    alone = []
    for request in requests(KINDS):
        run(request, logits_of)
        alone.append(trace(request))
    for seed in range(3):
        shuffle = random.Random(seed)
        others = [make_request([2, i], request_id=100 + i, max_tokens=9, **KINDS[i % len(KINDS)]) for i in range(36)]
        batch = requests(KINDS)
        run_together(batch + others, shuffle, padding=seed)
        assert [trace(request) for request in batch] == alone


def test_seeds_and_samples_differ() -> None:
    texts = set()
    for seed in range(6):
        request = make_request([1], seed=seed, temperature=1.5, n=4, max_tokens=6)
        texts |= {tuple(s.output_ids) for s in run(request, logits_of)}
    assert len(texts) == 24


def test_greedy_batch_is_argmax_with_the_lowest_id_on_ties() -> None:
    logits = torch.randint(0, 3, (50, VOCAB)).float()
    expected = logits.numpy().argmax(-1).tolist()
    order = [7, 3, 30, 31, 32, 49]
    for picked in (list(range(50)), order, list(range(10, 20))):
        results = Sampler(VOCAB).sample([SampleRow(make_request(), i) for i in picked], logits.clone())
        assert [r.continuations[0].token_id for r in results] == [expected[i] for i in picked]
        edits = [SampleRow(make_request(logprobs=0), i) for i in picked]
        results = Sampler(VOCAB).sample(edits, logits.clone())
        assert [r.continuations[0].token_id for r in results] == [expected[i] for i in picked]


def test_padded_vocabulary_is_never_chosen() -> None:
    logits = torch.zeros(3, VOCAB + 7)
    logits[:, VOCAB:] = 100.0
    rows = [SampleRow(make_request(), 0), SampleRow(make_request(top_k=3), 1), SampleRow(make_request(logprobs=2), 2)]
    for result in Sampler(VOCAB).sample(rows, logits):
        assert result.continuations[0].token_id < VOCAB
        assert all(token < VOCAB for token in result.continuations[0].top_logprobs or {})


@pytest.mark.parametrize("kind", [{}, {"logprobs": 1}, {"top_p": 0.5}, {"use_beam_search": True, "n": 2}], ids=str)
@pytest.mark.parametrize(
    ("poison", "word"), [(float("nan"), "NaN"), (float("inf"), r"\+Inf"), (-float("inf"), "only -Inf")]
)
def test_unusable_logits_fail_their_request_only(kind: dict[str, Any], poison: float, word: str) -> None:
    logits = torch.randn(3, VOCAB)
    if poison < 0:
        logits[1] = poison
    else:
        logits[1, 5] = poison
    expected = [int(logits[0].argmax()), int(logits[2].argmax())]
    rows = [SampleRow(make_request(), 0), SampleRow(make_request([1, 2], **kind), 1), SampleRow(make_request(), 2)]
    before, failed, after = Sampler(VOCAB).sample(rows, logits)
    with pytest.raises(RequestError, match=f"the model produced {word} logits at token position 2"):
        raise failed.error or AssertionError("no error")
    assert [r.continuations[0].token_id for r in (before, after)] == expected


def test_logits_made_under_inference_mode_may_be_edited() -> None:
    with torch.inference_mode():
        logits = torch.randn(2, VOCAB)
    rows = [SampleRow(make_request([1, 5], repetition_penalty=2.0), 0), SampleRow(make_request(bad_token_ids=[3]), 1)]
    assert all(result.error is None for result in Sampler(VOCAB).sample(rows, logits))


def test_nothing_to_sample() -> None:
    assert Sampler(VOCAB).sample([], torch.empty(0, VOCAB)) == []


def test_logprobs_are_the_models_own() -> None:
    """Temperature, filters, penalties and bias do not show in them."""
    logits = logits_of([[1, 2], [1, 3]])
    expected = torch.from_numpy(np.asarray(logits, np.float64)).log_softmax(-1)
    options: list[dict[str, Any]] = [
        {"temperature": 0.3, "top_k": 4},
        {"repetition_penalty": 3.0, "embedding_bias": torch.arange(VOCAB) / 10, "bad_token_ids": [7]},
    ]
    for extra in options:
        for k in (0, 1, 5):
            request = make_request([1, 3], logprobs=k, **extra)
            [result] = Sampler(VOCAB).sample([SampleRow(request, 1)], logits.clone())
            [new] = result.continuations
            assert new.top_logprobs is not None
            assert new.logprob == pytest.approx(expected[1, new.token_id].item(), abs=1e-5)
            best = expected[1].topk(k).indices.tolist()
            assert list(new.top_logprobs) == best + [new.token_id] * (new.token_id not in best)
            order = expected[1].argsort(descending=True).tolist()
            for token, entry in new.top_logprobs.items():
                assert entry.logprob == pytest.approx(expected[1, token].item(), abs=1e-5)
                assert entry.rank == order.index(token) + 1


def test_no_logprobs_unless_needed() -> None:
    logits = logits_of([[1], [2]])
    rows = [SampleRow(make_request(top_k=4), 0), SampleRow(make_request(top_k=4, n=1, best_of=2), 1)]
    first, second = Sampler(VOCAB).sample(rows, logits)
    assert first.continuations[0].logprob is None
    assert [token.logprob is None for token in second.continuations] == [False, False]


def test_prompt_logprobs_do_not_depend_on_chunks() -> None:
    ids = [5, 9, 9, 33, 2, 60, 61, 4]
    logits = torch.randn(len(ids), VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    whole = prompt_logprobs(logits, ids, 2)
    for size in (1, 3, 5):
        chunks = range(0, len(ids), size)
        assert [e for i in chunks for e in prompt_logprobs(logits[i : i + size].clone(), ids[i : i + size], 2)] == whole
    expected = logits.double().log_softmax(-1)
    for row, token, entry in zip(expected, ids, whole):
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert list(entry)[:2] == row.topk(2).indices.tolist()
    with pytest.raises(ValueError, match="shorter"):
        prompt_logprobs(logits, ids[:-1], 0)


def test_top_logprobs_of_a_small_vocabulary() -> None:
    row = torch.tensor([0.1, 0.7, 0.2]).log()
    assert list(top_logprobs(row, 0, 50)) == [1, 2, 0]
    assert top_logprobs(row, 0, 0)[0].rank == 3


def test_best_of_returns_the_most_likely_samples() -> None:
    request = make_request([1], temperature=1.0, seed=3, n=2, best_of=6, max_tokens=5)
    outputs = run(request, logits_of)
    sums = sorted((s.cumulative_logprob for s in request.finished), reverse=True)
    assert len(request.finished) == 6
    assert [s.cumulative_logprob for s in outputs] == sums[:2]
    first = outputs[0]
    rows = logits_of([first.token_ids[: 1 + i] for i in range(5)]).log_softmax(-1)
    expected = sum(rows[i, token].item() for i, token in enumerate(first.output_ids))
    assert first.cumulative_logprob == pytest.approx(expected, abs=1e-4)


def test_samples_keep_their_order_and_their_randomness_as_others_end() -> None:
    """A sample's tokens are those of the request without the end token, cut where it appears."""
    free = run(make_request([1], temperature=1.0, seed=3, n=5, max_tokens=8), logits_of)
    common = max(range(VOCAB), key=lambda token: sum(token in s.output_ids for s in free))
    request = make_request([1], temperature=1.0, seed=3, n=5, max_tokens=8, end_id=common)
    outputs = run(request, logits_of)
    assert [s.index for s in outputs] == [0, 1, 2, 3, 4]
    assert any(s.finish_reason == "stop" for s in outputs)
    for cut, whole in zip(outputs, free, strict=True):
        ids = whole.output_ids
        assert cut.output_ids == (ids[: ids.index(common)] if common in ids else ids)
