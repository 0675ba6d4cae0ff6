"""ActiveRequest: a request in the loop, and what its user is told of it. Roster: all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lamella_core.errors import RequestError
from lamella_executor.failures import decoder_error
from lamella_executor.request import CompletionOutput, RequestStatus, RequestUpdate
from lamella_executor.result import GenerationResult
from lamella_executor.sampler.logprobs import needs_logprobs
from lamella_executor.sampler.outputs import select_outputs
from lamella_executor.sampler.stop import streamable_length, streamable_tokens
from lamella_executor.sequence import PENDING_TOKEN, Logprob, RequestState, Sequence
from lamella_executor.stats import RequestMetrics

if TYPE_CHECKING:
    from lamella_executor.scheduler.scheduler import Scheduler


class ActiveRequest:
    """Publishes a request's states and outputs into its result. Only the loop's thread touches it.

    ``last_plain`` and ``ends`` tell which tokens of a single sequence need no attention: those at positions before
    ``last_plain`` (0: none, the text grows with each token or the user is shown it) that are not in ``ends``.
    """

    __slots__ = (
        "_first_token_s", "_is_streamed", "_last_token_s", "_num_positions", "_num_shown", "_result", "_status", "ends",
        "last_plain", "request",
    )  # fmt: skip

    def __init__(self, request: RequestState, result: GenerationResult) -> None:
        self.request = request
        self._result = result
        self._status = RequestStatus.QUEUED
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self._num_positions = 0  # generated positions; samples or beams side by side count once
        self._num_shown = 0  # characters and tokens of the last report
        params = request.params
        # best_of samples are ranked at the end; until then it is unknown which are the outputs.
        self._is_streamed = result.streaming and (params.use_beam_search or params.width == params.n)
        self.ends = params.stop_ids.union(request.extra_end_ids, () if request.end_id is None else (request.end_id,))
        is_plain = not self._is_streamed and request.sequences[0].decoder is None
        self.last_plain = request.num_prompt_tokens + request.max_tokens - 1 if is_plain else 0

    def run(self) -> None:
        """Tokens of the request are computed in this step."""
        if self._status is not RequestStatus.RUNNING:
            self._become(RequestStatus.RUNNING)

    def pause(self) -> None:
        """The request lost its blocks; one that has never run stays queued."""
        if self._status is RequestStatus.RUNNING:
            self._become(RequestStatus.PAUSED)

    def count_token(self, now: float) -> None:
        """The request was sampled at time ``now``."""
        if self._first_token_s is None:
            self._first_token_s = now
        self._last_token_s = now
        self._num_positions += 1

    @property
    def is_done(self) -> bool:
        """Whether the user was told a terminal state."""
        return self._result.done

    def report(self) -> RequestError | None:
        """Shows a streaming request's user what is new, without text or tokens that a stop string may take back.

        Returns the error if the request's decoder raised; nothing is shown then.
        """
        if not self._is_streamed:
            return None
        try:
            outputs = [self._output(i, sequence, is_final=False) for i, sequence in enumerate(self._candidates())]
        except BaseException as cause:  # noqa: BLE001 - the decoder is the user's code and may raise anything
            return decoder_error(cause)
        num_shown = sum(len(output.text) + len(output.token_ids) for output in outputs)
        if num_shown != self._num_shown:
            self._num_shown = num_shown
            self._result.publish(RequestUpdate(self._status, outputs, self._prompt_logprobs()))
        return None

    def conclude(self, status: RequestStatus) -> None:
        """Publishes the terminal state FINISHED or CANCELLED with the final outputs; FAILED if the decoder raises."""
        sequences = select_outputs(self.request) or self._candidates()
        try:
            outputs = [self._output(i, sequence, is_final=True) for i, sequence in enumerate(sequences)]
        except BaseException as cause:  # noqa: BLE001 - the decoder is the user's code and may raise anything
            self.fail(decoder_error(cause))
            return
        metrics = self._metrics(sum(output.length for output in outputs))
        self._result.publish(RequestUpdate(status, outputs, self._prompt_logprobs(), metrics=metrics))

    def fail(self, error: Exception) -> None:
        """Publishes the terminal state FAILED."""
        self._result.publish(RequestUpdate(RequestStatus.FAILED, error=error, metrics=self._metrics(0)))

    def _become(self, status: RequestStatus) -> None:
        self._status = status
        self._result.publish(RequestUpdate(status))

    def _candidates(self) -> list[Sequence]:
        """The sequences to show while the request runs: samples by index, or the best live beams."""
        request = self.request
        if request.params.use_beam_search:
            return request.sequences[: request.params.n]
        return sorted(request.finished + request.sequences, key=lambda sequence: sequence.index)[: request.params.n]

    def _output(self, index: int, sequence: Sequence, *, is_final: bool) -> CompletionOutput:
        request = self.request
        token_ids, text = sequence.output_ids, sequence.text
        if not is_final:
            token_ids = token_ids[: streamable_tokens(sequence, request)]
            text = text[: streamable_length(sequence, request)]
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=sequence.cumulative_logprob if needs_logprobs(request) else None,
            logprobs=sequence.logprobs[: len(token_ids)] if request.params.logprobs is not None else None,
            finish_reason=sequence.finish_reason or ("cancelled" if is_final else None),
            stop_reason=sequence.stop_reason,
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        request = self.request
        if request.params.prompt_logprobs is None or len(request.prompt_logprobs) < request.num_prompt_tokens:
            return None
        return request.prompt_logprobs

    def _metrics(self, num_output_tokens: int) -> RequestMetrics:
        request, now = self.request, time.monotonic()
        arrival, first, scheduled = request.arrival_s, self._first_token_s, request.first_scheduled_s
        num_gaps = self._num_positions - 1
        return RequestMetrics(
            arrival_s=arrival,
            queue_s=None if scheduled is None else scheduled - arrival,
            ttft_s=None if first is None else first - arrival,
            itl_mean_s=(self._last_token_s - first) / num_gaps if first is not None and num_gaps > 0 else None,
            e2e_s=now - arrival,
            num_prompt_tokens=len(self._result.prompt_token_ids),
            num_output_tokens=num_output_tokens,
            num_reused_tokens=request.num_reused_tokens,
            num_pauses=request.num_pauses,
        )


class Roster:
    """The requests that the loop holds, from their submission to the moment their user is told the end."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._active: dict[int, ActiveRequest] = {}

    def __len__(self) -> int:
        return len(self._active)

    def add(self, active: ActiveRequest) -> None:
        self._active[active.request.request_id] = active

    def find(self, request_id: int) -> ActiveRequest | None:
        return self._active.get(request_id)

    def of(self, request: RequestState) -> ActiveRequest | None:
        """Returns the entry of a request; None if it has ended, whoever has its id now."""
        active = self._active.get(request.request_id)
        return active if active is not None and active.request is request else None

    def finish(self, active: ActiveRequest, status: RequestStatus) -> None:
        """Takes a request out with its outputs. It stays known until its user has been told, whatever happens here."""
        for sequence in active.request.sequences:  # aborted with a step in flight: that token will never be known
            while sequence.token_ids[-1] == PENDING_TOKEN:
                sequence.token_ids.pop()
        self._scheduler.finish(active.request)
        active.conclude(status)
        del self._active[active.request.request_id]

    def fail(self, active: ActiveRequest, error: RequestError) -> None:
        """Takes a request out; its blocks are freed, and nobody reuses them."""
        self._scheduler.finish(active.request, cache=False)
        active.fail(error)
        del self._active[active.request.request_id]

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """Tells every user an error of its own; nothing is freed, for the loop is not used afterwards."""
        for active in self._active.values():
            if not active.is_done:
                active.fail(make_error())
        self._active.clear()

    def abandon(self, make_error: Callable[[], Exception]) -> None:
        """Tells every user an error of its own, on another thread than the loop's, which hangs."""
        for active in list(self._active.values()):
            try:
                if not active.is_done:
                    active.fail(make_error())
            except RuntimeError:  # the loop has come back at this moment, and tells it itself
                continue
