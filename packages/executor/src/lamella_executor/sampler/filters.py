"""Temperature, top-k, top-p and min-p, applied in this order, and the draw from what is left.

The meaning of each equals transformers' TemperatureLogitsWarper, TopKLogitsWarper (ties with the k-th are kept),
TopPLogitsWarper (the smallest set whose mass reaches top_p) and MinPLogitsWarper. Before them come the edits of
`lamella_executor.sampler.edits`. Probabilities are float64 and normalized by their maximum, so that no temperature
overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lamella_core.errors import RequestError
from lamella_executor.sampling_params import SamplingParams

_TOP_P_FIRST_TRY = 256  # top-p sorts this many candidates; all of them only if their mass is not enough
_TIES_EXPECTED = 8  # top-k looks at this many more scores for ties with the k-th; at all of them if there are more


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
    values, ids = scores.topk(min(k + _TIES_EXPECTED, len(scores)))  # descending, NaN first
    _check_best(values[0])
    threshold = values[k - 1]
    if values[-1] < threshold:
        return ids[values >= threshold].sort().values
    return torch.nonzero(scores >= threshold).squeeze(1)


def _top_p_places(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Returns the places, ascending, of the smallest set of weights whose share of the total reaches ``top_p``.

    Of weights that equal the smallest one in the set, those with the lowest places are in it.
    """
    target = top_p * weights.sum()
    largest = weights.topk(min(_TOP_P_FIRST_TRY, len(weights))).values
    if largest.sum() <= target:  # a flat distribution: sort all of it
        largest = _sort_descending(weights)
    mass_before = largest.cumsum(0) - largest
    count = max(1, int((mass_before < target).sum()))
    threshold = largest[count - 1]
    is_kept = weights >= threshold
    excess = int(is_kept.sum()) - count
    if excess > 0:
        ties = torch.nonzero(weights == threshold).squeeze(1)
        is_kept[ties[len(ties) - excess :]] = False
    return torch.nonzero(is_kept).squeeze(1)


def _sort_descending(values: torch.Tensor) -> torch.Tensor:
    if values.device.type != "cpu":
        return values.sort(descending=True).values
    return torch.from_numpy(
        np.sort(values.numpy())[::-1].copy()
    )  # vectorized; torch's sort on a CPU is 10 times slower


def _take(
    token_ids: torch.Tensor | None, weights: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (places if token_ids is None else token_ids[places]), weights[places]
