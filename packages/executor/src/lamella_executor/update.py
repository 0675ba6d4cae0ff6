"""How a request's sequences go on after sampling: forks, appended tokens, ends."""

from __future__ import annotations

from lamella_core.errors import RequestError
from lamella_executor.failures import decoder_error
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.sampler.stop import StopChecker
from lamella_executor.sampler.types import NewToken
from lamella_executor.sequence import RequestState, Sequence

_STOPS = StopChecker()


def advance_sequences(request: RequestState, continuations: list[NewToken], kv: KvCacheManager) -> None:
    """Makes the continuations, in order, the request's live sequences; those that end move to ``request.finished``.

    A parent's first continuation goes on in place, further ones are forks that share its blocks. Parents without one
    are dropped.

    Raises:
        RequestError: the request's decoder raised. The request must be finished then; all its blocks are still found
            through ``request.sequences`` and ``request.finished``.
    """
    parents = request.sequences
    try:
        children = _branch(parents, continuations)
        _adopt(request, parents, children, continuations, kv)
        for sequence, token in zip(children, continuations):
            _STOPS.append(sequence, request, token)
    except RequestError:
        raise
    except BaseException as cause:  # the decoder is the user's code and may raise anything
        raise decoder_error(cause) from cause
    for sequence in children:
        if sequence.finish_reason is not None:
            kv.free(sequence)
            request.finished.append(sequence)
    if any(sequence.finish_reason is not None for sequence in children):
        request.sequences = [sequence for sequence in children if sequence.finish_reason is None]


def _branch(parents: list[Sequence], continuations: list[NewToken]) -> list[Sequence]:
    """Returns one sequence per continuation; changes no parent."""
    is_used = [False] * len(parents)
    children = []
    for position, token in enumerate(continuations):
        parent = parents[token.parent]
        children.append(parent.fork(position) if is_used[token.parent] else parent)
        is_used[token.parent] = True
    return children


def _adopt(
    request: RequestState,
    parents: list[Sequence],
    children: list[Sequence],
    continuations: list[NewToken],
    kv: KvCacheManager,
) -> None:
    """Makes the children live: blocks are shared with forks and taken from parents that end here."""
    for sequence, token in zip(children, continuations):
        if sequence is not parents[token.parent]:
            kv.fork(parents[token.parent], sequence)
    if len(children) != len(parents) or any(child is not parent for child, parent in zip(children, parents)):
        kept = {id(child) for child in children}
        for parent in parents:
            if id(parent) not in kept:
                kv.free(parent)
        request.sequences = children
    if request.params.use_beam_search:
        for position, sequence in enumerate(children):
            sequence.index = position
