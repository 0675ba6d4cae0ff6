"""Updater: takes the results of a step over into its requests: new tokens, forks, reports, ends."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import torch

from lamella_core.errors import RequestError
from lamella_executor.active import ActiveRequest, Roster
from lamella_executor.failures import decoder_error, detach
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.request import RequestStatus
from lamella_executor.runner.base import NAN_LOGITS, NEGATIVE_INFINITE_LOGITS, POSITIVE_INFINITE_LOGITS
from lamella_executor.sampler.logprobs import prompt_logprobs
from lamella_executor.sampler.sampler import Sampler, not_finite_error
from lamella_executor.sampler.stop import StopChecker
from lamella_executor.sampler.types import NewToken, SampleResult, SampleRow
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import RequestState, Sequence

_MAXIMA = {NAN_LOGITS: math.nan, POSITIVE_INFINITE_LOGITS: math.inf, NEGATIVE_INFINITE_LOGITS: -math.inf}
_STOPS = StopChecker()


class Updater:
    """Appends what a step has sampled, and ends, fails or reports each of its requests.

    Requests may have ended, failed, been aborted or paused since the step was planned. The rows of those that are gone
    are dropped; a paused one still takes its token, which is computed again when it resumes.
    """

    def __init__(self, roster: Roster, kv: KvCacheManager, sampler: Sampler) -> None:
        self._roster = roster
        self._kv = kv
        self._sampler = sampler

    def take_tokens(self, items: SequenceOf[ScheduledSequence], tokens: SequenceOf[int], now: float) -> None:
        """Puts tokens sampled on the device in the places of their `PENDING_TOKEN`.

        Args:
            items: the sampled items of a step, of requests with one sequence.
            tokens: one each, or a negative code (`LaunchedStep.collect`).
            now: time.monotonic() of their arrival.
        """
        size, of = self._kv.tokens_per_block, self._roster.of
        for item, token in zip(items, tokens, strict=True):
            active = of(item.request)
            if active is None:
                continue
            active.count_token(now)
            end = item.end
            if end < active.last_plain and token >= 0 and token not in active.ends:
                item.sequence.token_ids[end] = token
                if (end + 1) % size == 0:
                    self._commit_known(item.sequence, end)
            else:
                self._take_token(active, item, token)

    def take_logits(
        self, plan: StepPlan, device_items: SequenceOf[ScheduledSequence], logits: torch.Tensor, now: float
    ) -> None:
        """Samples on the host what the device did not; before that, reads prompt log-probabilities.

        Args:
            plan: a step's; of its requests with logits nothing was planned again since.
            device_items: those of its items that were sampled on the device.
            logits: [plan.num_logits, vocab_size] float32; scratch.
            now: time.monotonic() of their arrival.
        """
        rows = self._sampled_rows(plan, {item.request.request_id for item in device_items}, logits)
        for row, result in zip(rows, self._sampler.sample(rows, logits)):
            active = self._roster.of(row.request)
            if active is None:
                raise RuntimeError(f"request {row.request.request_id} was sampled but is not known")
            active.count_token(now)
            self._go_on(active, result)

    def _take_token(self, active: ActiveRequest, item: ScheduledSequence, token: int) -> None:
        """Appends a token with all that may follow from it."""
        token_ids, end = item.sequence.token_ids, item.end
        later = token_ids[end + 1 :]  # the token of the next step, if that is launched already
        del token_ids[end:]
        if token >= 0:
            result = SampleResult([NewToken(0, token)])
        elif token in _MAXIMA:
            result = SampleResult(error=not_finite_error(_MAXIMA[token], item.request))
        else:
            raise RuntimeError(f"the runner returned token {token}, which is neither a token id nor a known code")
        if self._go_on(active, result):
            token_ids += later
            if (end + 1) % self._kv.tokens_per_block == 0:
                self._commit_known(item.sequence, end)

    def _commit_known(self, sequence: Sequence, position: int) -> None:
        """Makes the block that ends with a token findable once that token, known by now, is computed too."""
        if position < sequence.num_computed_tokens:  # else `Scheduler.advance` does it
            self._kv.commit(sequence, position, position + 1)

    def _go_on(self, active: ActiveRequest, result: SampleResult) -> bool:
        """Appends the new tokens, then ends, fails or reports the request; returns whether it goes on."""
        request = active.request
        error = self._append(request, result)
        if error is None and (result.is_done or not request.sequences):
            self._roster.finish(active, RequestStatus.FINISHED)
            return False
        if error is None:
            error = active.report()
        if error is not None:
            self._roster.fail(active, error)
        return error is None

    def _append(self, request: RequestState, result: SampleResult) -> RequestError | None:
        if result.error is not None:
            return _as_request_error(result.error)
        if result.is_done:
            return None
        try:
            advance_sequences(request, result.continuations, self._kv)
        except RequestError as error:
            return error
        return None

    def _sampled_rows(self, plan: StepPlan, skipped: set[int], logits: torch.Tensor) -> list[SampleRow]:
        """Reads prompt log-probabilities off the logits; returns the requests to be sampled, in row order."""
        rows: dict[int, SampleRow] = {}
        first_row = 0
        for item in plan.items:
            request = item.request
            first_row += item.num_logits
            if not item.num_logits or self._roster.of(request) is None:
                continue
            if request.params.prompt_logprobs is not None:
                _read_prompt_logprobs(item, logits[first_row - item.num_logits : first_row])
            if item.is_sampled and request.request_id not in skipped and request.request_id not in rows:
                rows[request.request_id] = SampleRow(request, first_row - 1)
        return list(rows.values())


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
    if len(children) != len(parents) or any(child is not parent for child, parent in zip(children, parents)):
        kept = {id(child) for child in children}
        for parent in parents:
            if id(parent) not in kept:
                kv.free(parent)  # nobody forks from it, and forks may need its slot
        request.sequences = children
    for sequence, token in zip(children, continuations):
        if sequence is not parents[token.parent]:
            kv.fork(parents[token.parent], sequence)
    if request.params.use_beam_search:
        for position, sequence in enumerate(children):
            sequence.index = position


def _read_prompt_logprobs(item: ScheduledSequence, logits: torch.Tensor) -> None:
    """Appends the log-probabilities of prompt tokens that follow this item's rows, [num_logits, vocab_size]."""
    request, known = item.request, item.request.prompt_logprobs
    count = request.params.prompt_logprobs
    num_prompt = item.sequence.num_prompt_tokens
    if count is None or len(known) >= num_prompt:
        return
    first_position = item.end - item.num_logits  # of the first row
    start = len(known) - 1  # row of position p predicts p + 1; known holds 0..len-1
    end = min(item.end, num_prompt - 1)
    if start < end:
        following = item.sequence.token_ids[start + 1 : end + 1]
        known.extend(prompt_logprobs(logits[start - first_position : end - first_position], following, count))


def _as_request_error(error: Exception) -> RequestError:
    if error.__cause__ is not None:
        detach(error.__cause__)
    error.__traceback__ = None
    return error if isinstance(error, RequestError) else RequestError(str(error))
