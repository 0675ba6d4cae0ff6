"""Which sequences of a request are its outputs."""

from __future__ import annotations

from lamella_executor.sampler.beam import finalize
from lamella_executor.sequence import RequestState, Sequence


def select_outputs(request: RequestState) -> list[Sequence]:
    """Returns the request's ``n`` outputs; an output's index is its place in the list.

    Beam search: the best hypotheses. ``best_of`` above ``n``: the samples with the highest cumulative log-probability,
    best first. Otherwise every sample, by its index. Works on running requests too (beams: what has ended so far).
    """
    if request.params.use_beam_search:
        return finalize(request)
    samples = sorted(request.finished + request.sequences, key=lambda sequence: sequence.index)
    if len(samples) > request.params.n:
        samples.sort(key=lambda sequence: -sequence.cumulative_logprob)
    return samples[: request.params.n]
