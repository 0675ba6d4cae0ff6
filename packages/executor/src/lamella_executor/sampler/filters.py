"""Temperature, top-k, top-p and min-p, applied in this order, and the draw from what is left.

The meaning of each equals transformers' TemperatureLogitsWarper, TopKLogitsWarper (ties with the k-th are kept),
TopPLogitsWarper (the smallest set whose mass reaches top_p) and MinPLogitsWarper. Before them come the edits of
`lamella_executor.sampler.edits`. Probabilities are float64 and normalized by their maximum, so that no temperature
overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamella_core.errors import RequestError
from lamella_executor.sampling_params import SamplingParams

_TOP_P_FIRST_TRY = 256  # top-p sorts this many candidates, then 16 times as many, ... until their mass suffices


@dataclass(frozen=True)
class Candidates:
    """The tokens that may be drawn, in order of their ids.

    The order makes a draw depend only on which tokens are left and their weights, not on how the filters found them.
    """

    token_ids: torch.Tensor | None  # [c] int64, ascending; None: all tokens
    weights: torch.Tensor  # [c] float64, probabilities up to a common factor

    def draw(self, u: float) -> int:
        """Returns the token at quantile ``u`` (in [0, 1)) of the distribution (inverse-CDF sampling)."""
        cumulative = self.weights.cumsum(0)
        place = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
        if place >= len(cumulative):  # u times the total was rounded up to the total
            place = int(torch.searchsorted(cumulative, cumulative[-1]))
        return place if self.token_ids is None else int(self.token_ids[place])


def best_token(scores: torch.Tensor) -> int:
    """Returns the token with the highest of the edited ``scores`` [vocab_size] float32; the lowest id wins a tie.

    Raises:
        RequestError: a score is NaN or +Inf, or every token is banned.
    """
    best, token = scores.max(0)
    _check_best(best)
    return int(token)


def filter_logits(scores: torch.Tensor, params: SamplingParams) -> Candidates:
    """Returns what is left of one row after the request's filters.

    Args:
        scores: [vocab_size] float32, edited logits; -inf for banned tokens. Not changed.
        params: of a request that samples (temperature above 0).

    Raises:
        RequestError: a score is NaN or +Inf, or every token is banned.
    """
    token_ids: torch.Tensor | None = None
    top_k = params.top_k or 0
    if 0 < top_k < scores.shape[0]:
        token_ids = _top_k_ids(scores, top_k)
        scores = scores[token_ids]
    weights = _weights(scores, 1.0 if params.temperature is None else params.temperature)
    if params.top_p is not None and params.top_p < 1.0:
        token_ids, weights = _take(token_ids, weights, _top_p_places(weights, params.top_p))
    if params.min_p:
        token_ids, weights = _take(token_ids, weights, torch.nonzero(weights >= params.min_p).squeeze(1))
    return Candidates(token_ids, weights)


def _weights(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns exp((scores - max) / temperature), float64; the largest weight is 1."""
    scores = scores.to(torch.float64)
    best = scores.max()
    _check_best(best)
    return ((scores - best) / temperature).exp()


def _check_best(best: torch.Tensor) -> None:
    if not torch.isfinite(best):
        raise RequestError(
            "every token is banned, or a score is NaN or +Inf, after penalties, embedding_bias and logits processors; "
            "check the request's bad words, min_tokens, embedding_bias and logits_processor"
        )


def _top_k_ids(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the ids, ascending, of the k largest scores and of those that equal the k-th."""
    return torch.nonzero(scores >= scores.topk(k).values[-1]).squeeze(1)


def _top_p_places(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Returns the places, ascending, of the smallest set of weights whose share of the total reaches top_p.

    Only the largest weights are sorted: as many as needed.
    """
    target = top_p * weights.sum()
    count = min(_TOP_P_FIRST_TRY, len(weights))
    while True:
        largest, places = weights.topk(count)
        before = largest.cumsum(0) - largest  # mass of the more likely tokens
        if before[-1] >= target or count == len(weights):
            break
        count = min(16 * count, len(weights))
    keep = before < target
    keep[0] = True
    return places[keep].sort().values


def _take(
    token_ids: torch.Tensor | None, weights: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (places if token_ids is None else token_ids[places]), weights[places]
