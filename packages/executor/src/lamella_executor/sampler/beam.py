"""Beam search of one request; one `step_beams` per generated position.

Semantics are those of ``transformers.generate(num_beams=best_of, num_return_sequences=n)``, token for token in float32:
every step ranks all continuations of all live beams by accumulated score (processed log-probabilities); those among the
best ``width`` that end become hypotheses with the score ``accumulated / length ** length_penalty`` (length counts the
end token); the best ``width`` that do not end live on. ``early_stopping``: True ends with ``width`` hypotheses; False
ends when the best live beam, at its present length, is no better than the worst hypothesis; "never" assumes the most
favourable length that max_tokens allows.

``beam_search_diversity_rate`` (Li and Jurafsky, "Mutual information and diverse decoding improve neural machine
translation", 2016) lowers a continuation by rate x its rank (from 0) among its siblings while continuations are chosen;
the accumulated scores do not contain it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from lamella_core.errors import RequestError
from lamella_executor.failures import decoder_error
from lamella_executor.sampler.logprobs import top_logprobs
from lamella_executor.sampler.penalties import edit_logits, has_edits
from lamella_executor.sampler.stop import StopChecker, is_end_token
from lamella_executor.sampler.types import NewToken, SampleResult
from lamella_executor.sequence import RequestState, Sequence


@dataclass(slots=True)
class BeamState:
    """What a beam request remembers between steps; in ``RequestState.beam``."""

    scores: torch.Tensor  # [live beams] float32 accumulated scores, in the order of request.sequences
    hypotheses: list[tuple[float, Sequence]] = field(default_factory=list)  # (final score, ended beam), best first

    def add(self, score: float, hypothesis: Sequence, width: int) -> None:
        """Inserts a hypothesis in order of score, after equals, and keeps the best ``width``."""
        place = sum(1 for other, _ in self.hypotheses if other >= score)
        self.hypotheses.insert(place, (score, hypothesis))
        del self.hypotheses[width:]


@dataclass(frozen=True, slots=True)
class _Candidate:
    parent: int  # indexes request.sequences
    token_id: int
    score: float  # accumulated; a float32 value


def step_beams(request: RequestState, logits: torch.Tensor) -> SampleResult:
    """Chooses the continuations and hypotheses of one step; updates ``request.beam``.

    Args:
        request: a beam request; one live sequence in its first step.
        logits: [len(request.sequences), vocab_size] float32 with finite maxima. Not changed.

    Raises:
        RequestError: a logits processor raised, or every continuation is banned.
    """
    raw = torch.stack([row.log_softmax(-1) for row in logits.unbind(0)])
    scores = raw
    if has_edits(request):
        scores = raw.clone()
        edit_logits(scores, request)
    state = request.beam if isinstance(request.beam, BeamState) else BeamState(raw.new_zeros(len(raw)))
    request.beam = state
    before = {id(hypothesis) for _, hypothesis in state.hypotheses}
    length = request.sequences[0].num_output_tokens + 1  # generated tokens of every beam, the next one included
    live: list[_Candidate] = []
    for place, candidate in enumerate(_best_candidates(scores + state.scores[:, None], request)):
        if place >= request.width and (len(live) == request.width or length == request.max_tokens):
            break
        ended = _ended(request, candidate, raw, place)
        if ended is None and len(live) < request.width:
            live.append(candidate)
        elif ended is not None and place < request.width:
            state.add(_final_score(candidate.score, length, request), ended, request.width)
    if not live and not state.hypotheses:
        raise RequestError(
            "beam search has no continuation left: bad words, stop tokens under min_tokens or a logits processor ban "
            "every token; allow more tokens"
        )
    return SampleResult(
        continuations=[] if (is_done := _is_done(state, live, request)) else _continue(state, live, request, raw),
        hypotheses=[hypothesis for _, hypothesis in state.hypotheses if id(hypothesis) not in before],
        is_done=is_done,
    )


def finalize(request: RequestState) -> list[Sequence]:
    """Returns the ``n`` best hypotheses, best first; fewer only if fewer distinct continuations were allowed."""
    state = request.beam
    return [sequence for _, sequence in state.hypotheses[: request.params.n]] if isinstance(state, BeamState) else []


def _best_candidates(accumulated: torch.Tensor, request: RequestState) -> list[_Candidate]:
    """Returns the best continuations, best first: enough that ``width`` of them are no end tokens.

    Args:
        accumulated: [live beams, vocab_size] float32.
        request: whose beams these are.
    """
    num_beams, vocab_size = accumulated.shape
    num_ends = (request.end_id is not None) + len(request.extra_end_ids) + len(request.params.stop_ids)
    count = max(2, 1 + num_ends) * request.width
    rate = request.params.beam_search_diversity_rate
    if rate:
        siblings, tokens = accumulated.topk(min(count, vocab_size), dim=-1)  # [live beams, siblings]
        ranked = siblings - rate * torch.arange(siblings.shape[1], device=siblings.device)
        places = ranked.flatten().topk(min(count, ranked.numel())).indices
        values = siblings.flatten()[places]
        parents = (places // siblings.shape[1]).tolist()
        token_ids = tokens.flatten()[places].tolist()
    else:
        values, places = accumulated.flatten().topk(min(count, accumulated.numel()))
        parents, token_ids = (places // vocab_size).tolist(), (places % vocab_size).tolist()
    scores: list[float] = values.tolist()
    if any(math.isnan(score) or score == math.inf for score in scores):
        raise RequestError("a score is NaN or +Inf after penalties, embedding_bias and logits processors; check them")
    return [
        _Candidate(parent, token_id, score)
        for parent, token_id, score in zip(parents, token_ids, scores)
        if score > -math.inf
    ]


def _ended(request: RequestState, candidate: _Candidate, raw: torch.Tensor, index: int) -> Sequence | None:
    """Returns the finished sequence if this candidate ends its beam, else None."""
    parent = request.sequences[candidate.parent]
    params = request.params
    may_end = (
        bool(params.stop_strings)
        or parent.num_output_tokens + 1 >= request.max_tokens
        or is_end_token(candidate.token_id, request)
        or candidate.token_id in params.stop_ids
    )
    if not may_end:
        return None
    try:
        child = parent.fork(index)
        StopChecker().append(child, request, _new_token(candidate, request, raw))
    except BaseException as error:  # the decoder is the user's code and may raise anything
        raise decoder_error(error) from error
    return child if child.finish_reason is not None else None


def _new_token(candidate: _Candidate, request: RequestState, raw: torch.Tensor) -> NewToken:
    row = raw[candidate.parent]
    k = request.params.logprobs
    top = None if k is None else top_logprobs(row, candidate.token_id, k)
    return NewToken(candidate.parent, candidate.token_id, row[candidate.token_id].item(), top)


def _final_score(score: float, length: int, request: RequestState) -> float:
    """Returns the float32 score of a hypothesis of ``length`` generated tokens, its end token included."""
    return float(torch.tensor(score, dtype=torch.float32) / length**request.params.length_penalty)


def _is_done(state: BeamState, live: list[_Candidate], request: RequestState) -> bool:
    """Whether no live beam may improve the hypotheses any more."""
    params = request.params
    if not live:
        return True
    if len(state.hypotheses) < request.width:
        return False
    if params.early_stopping is True:
        return True
    length = request.sequences[0].num_output_tokens + 1
    if params.early_stopping == "never" and params.length_penalty > 0:
        length = request.max_tokens
    best = max(candidate.score for candidate in live)
    return not _final_score(best, length, request) > state.hypotheses[-1][0]


def _continue(state: BeamState, live: list[_Candidate], request: RequestState, raw: torch.Tensor) -> list[NewToken]:
    state.scores = raw.new_tensor([candidate.score for candidate in live])
    return [_new_token(candidate, request, raw) for candidate in live]
