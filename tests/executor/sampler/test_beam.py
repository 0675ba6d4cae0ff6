"""Beam search equals transformers' generate, token for token and score for score."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from tests.support.sampling import TableDecoder, advance, make_request, run
from transformers import LlamaConfig, LlamaForCausalLM

from lamella_core.errors import RequestError
from lamella_executor.sampler import Sampler, SampleRow, select_outputs
from lamella_executor.sampler.beam import BeamState
from lamella_executor.sequence import Sequence

VOCAB = 257
ENDS = list(range(2, 250, 9))  # many, so that hypotheses end early
PROMPT = [1, 7, 30, 8]


@functools.cache
def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.6, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits_fn(seed: int) -> Any:
    @torch.inference_mode()
    def call(token_ids: list[list[int]]) -> torch.Tensor:
        return model(seed)(torch.tensor(token_ids), use_cache=False).logits[:, -1].float()

    return call


def reference(seed: int, width: int, n: int, ends: list[int], **options: Any) -> tuple[list[list[int]], list[float]]:
    out = model(seed).generate(
        torch.tensor([PROMPT]), num_beams=width, num_return_sequences=n, do_sample=False, eos_token_id=ends or None,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True, use_cache=False, **options,
    )  # fmt: skip
    token_ids = []
    for row in out.sequences[:, len(PROMPT) :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        token_ids.append(row[:stop])
    return token_ids, out.sequences_scores.tolist()


def ours(seed: int, width: int, n: int, ends: list[int], **options: Any) -> tuple[list[Sequence], list[float]]:
    request = make_request(
        PROMPT, use_beam_search=True, n=n, best_of=width, end_id=ends[0] if ends else None,
        extra_end_ids=tuple(ends[1:]), **options,
    )  # fmt: skip
    outputs = run(request, logits_fn(seed))
    assert isinstance(request.beam, BeamState)
    return outputs, [score for score, _ in request.beam.hypotheses[:n]]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 2.0])
def test_equals_transformers(early_stopping: bool | str, length_penalty: float) -> None:
    ended_early = 0
    for seed, (width, ends) in enumerate(itertools.product((2, 3, 8), (ENDS, ENDS[3:8]))):
        n = width - seed % 2
        shared = {"early_stopping": early_stopping, "length_penalty": length_penalty}
        expected, scores = reference(seed, width, n, ends, max_new_tokens=10, **shared)
        outputs, our_scores = ours(seed, width, n, ends, max_tokens=10, **shared)
        assert [output.output_ids for output in outputs] == expected
        torch.testing.assert_close(our_scores, scores, rtol=1e-5, atol=1e-5)
        ended_early += sum(output.finish_reason == "stop" for output in outputs)
    assert ended_early >= 2


EDITS = [
    ({"repetition_penalty": 1.7}, {}),
    ({"no_repeat_ngram_size": 2}, {}),
    ({"min_new_tokens": 4}, {"min_tokens": 4}),
    ({"bad_words_ids": [[3], [60, 61], [8, 12]]}, {"bad_token_ids": [3], "bad_words_ids": ((60, 61), (8, 12))}),
    ({"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_new_tokens": 3},
     {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_tokens": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "mine"), EDITS)
def test_edits_equal_transformers(theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    for seed in range(3):
        expected, _ = reference(seed, 4, 4, ENDS, max_new_tokens=9, **theirs)
        outputs, _ = ours(seed, 4, 4, ENDS, max_tokens=9, **(mine or theirs))
        assert [output.output_ids for output in outputs] == expected


def test_cumulative_logprob_is_that_of_the_model() -> None:
    outputs, _ = ours(3, 4, 4, [2], max_tokens=8, logprobs=2)
    for output in outputs:
        with torch.inference_mode():
            rows = model(3)(torch.tensor([output.token_ids + [2]])).logits[0].float().log_softmax(-1)
        chosen = output.output_ids + [2] * (output.finish_reason == "stop")
        expected = sum(rows[len(PROMPT) - 1 + i, token].item() for i, token in enumerate(chosen))
        assert output.cumulative_logprob == pytest.approx(expected, abs=1e-4)
        assert [token in top for token, top in zip(output.output_ids, output.logprobs, strict=True)] == [True] * len(
            output.logprobs
        )


def test_diversity_rate_spreads_parents() -> None:
    """Without it the best beam's continuations win; with a large rate every beam keeps its own best one."""

    def table(token_ids: list[list[int]]) -> torch.Tensor:
        first, later = [3.0, 2.0, 1.0, -8.0, -8.0, -8.0], [0.3, 0.2, 0.1, -8.0, -8.0, -8.0]
        return torch.tensor([first if len(ids) == 1 else later for ids in token_ids])

    for rate, expected in ((0.0, [[0, 0], [0, 1], [0, 2]]), (5.0, [[0, 0], [1, 0], [2, 0]])):
        request = make_request([5], use_beam_search=True, n=3, max_tokens=2, beam_search_diversity_rate=rate)
        assert [sequence.output_ids for sequence in run(request, table)] == expected


def test_parents_and_widths_through_the_first_steps() -> None:
    request = make_request(PROMPT, use_beam_search=True, n=1, best_of=3, max_tokens=4)
    [result] = Sampler(VOCAB).sample([SampleRow(request, 0)], logits_fn(1)([PROMPT]))
    assert [token.parent for token in result.continuations] == [0, 0, 0]
    assert len({token.token_id for token in result.continuations}) == 3
    advance(request, result)
    assert [sequence.index for sequence in request.sequences] == [0, 1, 2]
    outputs = run(request, logits_fn(1))
    assert len(outputs) == 1
    assert outputs[0].finish_reason == "length"
    assert outputs[0].num_output_tokens == 4


def test_stop_string_ends_a_beam_and_is_cut() -> None:
    table = {0: "b", 1: "a", 2: ".", 3: ",", 4: "-", 5: ""}

    def alternating(token_ids: list[list[int]]) -> torch.Tensor:
        rows = [[0.0, 2.0] if ids[-1] == 0 else [2.0, 0.0] for ids in token_ids]
        return torch.tensor([row + [-1.0, -2.0, -3.0, -4.0] for row in rows])

    request = make_request([5], use_beam_search=True, n=2, max_tokens=4, stop="ba", decoder=TableDecoder(table))
    outputs = run(request, alternating)
    assert [output.stop_reason for output in outputs] == ["ba", "ba"]
    assert outputs[0].output_ids == []
    for output in outputs:
        assert "ba" not in output.text
        assert output.text == "".join(table[token] for token in output.output_ids)


def test_fewer_continuations_than_beams() -> None:
    request = make_request([0], use_beam_search=True, n=4, max_tokens=1, bad_token_ids=[0])
    outputs = run(request, lambda ids: torch.tensor([[0.0, 1.0, 2.0]]))
    assert [output.output_ids for output in outputs] == [[2], [1]]


def test_everything_banned_fails_the_request() -> None:
    request = make_request([0], use_beam_search=True, n=2, bad_token_ids=[0, 1, 2])
    with pytest.raises(RequestError, match="no continuation left"):
        run(request, lambda ids: torch.tensor([[0.0, 1.0, 2.0]]))
    assert select_outputs(request) == []


def test_processor_sees_log_probabilities_per_beam() -> None:
    seen = []

    def processor(req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream: Any, client: Any) -> None:
        seen.append((tuple(logits.shape), float(logits.exp().sum(-1).sub(1).abs().max()), len(token_ids)))
        logits[:, :, 7] = -float("inf")

    request = make_request(PROMPT, use_beam_search=True, n=3, max_tokens=3, logits_processor=processor)
    outputs = run(request, logits_fn(2))
    assert [shape for shape, _, _ in seen] == [(1, 1, VOCAB), (1, 3, VOCAB), (1, 3, VOCAB)]
    assert max(error for _, error, _ in seen) < 1e-5
    assert all(7 not in output.output_ids for output in outputs)


def test_a_raising_decoder_fails_its_request_only() -> None:
    request = make_request([1], use_beam_search=True, n=2, stop="x", decoder=TableDecoder({}))
    rows = [SampleRow(request, 0), SampleRow(make_request(), 1)]
    failed, other = Sampler(4).sample(rows, torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2))
    assert isinstance(failed.error, RequestError)
    assert "decoder raised KeyError: 3" in str(failed.error)
    assert other.continuations[0].token_id == 3
