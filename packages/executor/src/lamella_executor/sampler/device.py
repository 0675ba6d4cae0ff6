"""Which requests are sampled where their logits are, by one kernel for all rows, and which by the host's `Sampler`."""

from __future__ import annotations

from lamella_executor.sampler.logprobs import needs_logprobs
from lamella_executor.sequence import RequestState


def is_device_sampled(request: RequestState) -> bool:
    """Whether a request needs nothing but temperature, top-k, top-p and min-p of its own row; a fact for its life.

    It depends on the request alone, never on its neighbours, and so does the random stream that it is sampled with.
    """
    known = request.device_sampled
    if known is None:
        known = request.device_sampled = _needs_only_its_row(request)
    return known


def _needs_only_its_row(request: RequestState) -> bool:
    params = request.params
    return (
        params.width == 1
        and not params.use_beam_search
        and params.prompt_logprobs is None
        and not needs_logprobs(request)
        and not params.edits_logits
        and not request.bad_words_ids
        and params.min_tokens == 0
    )
