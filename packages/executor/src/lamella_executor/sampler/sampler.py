"""Sampler: logits in, one outcome per request out. Holds no state of any request."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import torch

from lamella_core.errors import RequestError
from lamella_executor.sampler.beam import step_beams
from lamella_executor.sampler.filters import best_token, filter_logits
from lamella_executor.sampler.logprobs import needs_logprobs, top_logprobs
from lamella_executor.sampler.penalties import edit_logits, has_edits
from lamella_executor.sampler.random import uniform
from lamella_executor.sampler.types import NewToken, SampleResult, SampleRow
from lamella_executor.sequence import RequestState


class Sampler:
    """Chooses the next tokens of the requests of one step.

    A request's outcome is bitwise the same whatever other requests are in the step: everything but the argmax of plain
    greedy requests is computed request by request, and random draws depend only on (seed, sequence index, position).
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @torch.inference_mode()
    def sample(self, rows: SequenceOf[SampleRow], logits: torch.Tensor) -> list[SampleResult]:
        """Samples every request once.

        Args:
            rows: the requests, and where their logits are.
            logits: [R, vocab_size or more] float32; scratch: rows of requests with penalties and the like are edited.

        Returns:
            One result per request, in the order of ``rows``. A request whose logits are NaN or infinite, or whose
            logits processor raises, gets a result with ``error``; the others are not touched by it.
        """
        logits = logits[:, : self.vocab_size]
        results: list[SampleResult | None] = [None] * len(rows)
        plain = [
            i for i, row in enumerate(rows) if row.request.params.is_plain_greedy and not row.request.bad_words_ids
        ]
        if plain:
            chosen = _argmax_rows(logits, [rows[i].first_row for i in plain])
            for i, (token, value) in zip(plain, chosen):
                if math.isfinite(value):
                    results[i] = SampleResult([NewToken(0, token)])
                else:
                    results[i] = SampleResult(error=not_finite_error(value, rows[i].request))
        return [self._sample_request(row, logits) if out is None else out for row, out in zip(rows, results)]

    def _sample_request(self, row: SampleRow, logits: torch.Tensor) -> SampleResult:
        request = row.request
        scores = logits[row.first_row : row.first_row + len(request.sequences)]
        try:
            for value in scores.amax(-1).tolist():
                if not math.isfinite(value):
                    raise not_finite_error(value, request)
            return step_beams(request, scores) if request.params.use_beam_search else _sample_rows(request, scores)
        except RequestError as error:
            return SampleResult(error=error)


def _sample_rows(request: RequestState, scores: torch.Tensor) -> SampleResult:
    """Samples every live sequence; in the first step its only sequence is sampled once per sample to be made.

    Args:
        request: not a beam request.
        scores: [len(request.sequences), vocab_size] float32, edited in place.
    """
    params = request.params
    raw = scores
    if has_edits(request):
        raw = scores.clone() if needs_logprobs(request) else scores
        edit_logits(scores, request)
    out: list[NewToken] = []
    for parent, sequence in enumerate(request.sequences):
        indices = range(params.width) if sequence.num_output_tokens == 0 else (sequence.index,)
        if params.is_greedy:
            tokens = [best_token(scores[parent])]
        else:
            candidates = filter_logits(scores[parent], params)
            position = sequence.num_output_tokens
            tokens = [candidates.draw(uniform(request.seed, index, position)) for index in indices]
        if not needs_logprobs(request):
            out.extend(NewToken(parent, token) for token in tokens)
            continue
        logprobs = raw[parent].log_softmax(-1)
        for token in tokens:
            top = None if params.logprobs is None else top_logprobs(logprobs, token, params.logprobs)
            out.append(NewToken(parent, token, logprobs[token].item(), top))
    return SampleResult(out)


def _argmax_rows(logits: torch.Tensor, rows: list[int]) -> list[tuple[int, float]]:
    """Returns (token, its logit) of each of the rows; the lowest token id wins a tie, NaN wins over everything."""
    first, last = rows[0], rows[-1]
    is_range = last - first + 1 == len(rows) and rows == list(range(first, last + 1))
    picked = logits[first : last + 1] if is_range else logits[rows]
    if picked.device.type == "cpu":  # numpy's argmax is vectorized, torch's on a CPU is not
        array = picked.numpy()
        best = array.argmax(-1)
        return list(zip(best.tolist(), array[range(len(rows)), best].tolist()))
    values, ids = picked.max(-1)
    return list(zip(ids.tolist(), values.tolist()))


def not_finite_error(value: float, request: RequestState) -> RequestError:
    """Returns the error of a request whose logits have no finite maximum; ``value``: that maximum."""
    what = "NaN" if math.isnan(value) else "+Inf" if value > 0 else "only -Inf"
    position = request.sequences[0].num_tokens
    return RequestError(
        f"the model produced {what} logits at token position {position}; its weights are damaged or its dtype "
        "overflows: check the checkpoint, or load the model with dtype='float32'"
    )
