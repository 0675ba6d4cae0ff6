"""ActiveRequest: a request in the loop, and what its user is told of it."""

from __future__ import annotations

import time

from lamella_core.errors import RequestError
from lamella_executor.failures import decoder_error
from lamella_executor.request import CompletionOutput, RequestStatus, RequestUpdate
from lamella_executor.result import GenerationResult
from lamella_executor.sampler.logprobs import needs_logprobs
from lamella_executor.sampler.outputs import select_outputs
from lamella_executor.sampler.stop import streamable_length, streamable_tokens
from lamella_executor.sequence import Logprob, RequestState, Sequence
from lamella_executor.stats import RequestMetrics


class ActiveRequest:
    """Publishes a request's states and outputs into its result. Only the loop's thread touches it."""

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
