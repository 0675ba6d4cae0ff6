"""RequestOutput: one request as the user of `LLM` holds it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING, Any

from lamella_core.errors import RequestError

if TYPE_CHECKING:
    from lamella_executor.request import CompletionOutput, RequestStatus
    from lamella_executor.result import GenerationResult
    from lamella_executor.sampling_params import SamplingParams
    from lamella_executor.sequence import Logprob
    from lamella_executor.stats import RequestMetrics


class RequestOutput:
    """A view of one request: future, awaitable, iterator and async iterator in one; see `GenerationResult`.

    ``outputs`` are its samples or beams. A streamed request yields this same object at each step, with cumulative
    ``text`` and ``token_ids`` and what is new in ``text_diff`` and ``token_ids_diff``.
    """

    __slots__ = ("_result", "prompt")

    def __init__(self, result: GenerationResult, prompt: str | None) -> None:
        """Made by `LLM.generate` and `LLM.generate_async`."""
        self._result = result
        self.prompt = prompt  # None for a prompt of token ids

    @property
    def request_id(self) -> int:
        return self._result.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._result.prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        return self._result.params

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The ``n`` samples or beams, best first."""
        return self._result.outputs

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        return self._result.prompt_logprobs

    @property
    def status(self) -> RequestStatus:
        return self._result.status

    @property
    def finished(self) -> bool:
        """Whether nothing more will come: complete, aborted or failed."""
        return self._result.done

    @property
    def aborted(self) -> bool:
        return self._result.status.value == "cancelled"

    @property
    def error(self) -> Exception | None:
        """Why the request failed; None if it did not."""
        return self._result.error

    @property
    def metrics(self) -> RequestMetrics | None:
        """Times of the request once it is finished: queue, time to first token, inter-token latency."""
        return self._result.metrics

    # What single-output callers of older APIs read.

    @property
    def text(self) -> str:
        """Text of the first output."""
        return self.outputs[0].text if self.outputs else ""

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first output."""
        return self.outputs[0].token_ids if self.outputs else []

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits until the request is finished; ``timeout`` is in seconds, in total.

        Raises:
            TimeoutError: not finished in time; the request goes on.
            RequestError: the request failed.
            EngineDeadError: the engine stopped before.
        """
        self._result.result(timeout)
        return self

    async def aresult(self, timeout: float | None = None) -> RequestOutput:
        """Like `result`, without blocking the event loop."""
        await self._result.aresult(timeout)
        return self

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[RequestOutput]:
        for _ in self._result:
            yield self

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        async for _ in self._result:
            yield self

    def abort(self) -> None:
        """Cancels the request; what was generated so far stays."""
        self._result.abort()

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id}, prompt={self.prompt!r}, "
            f"prompt_token_ids={self.prompt_token_ids}, outputs={self.outputs}, finished={self.finished})"
        )


class BatchError(RequestError):
    """Some requests of a batch failed while they ran; the others finished.

    Attributes:
        outputs: every `RequestOutput` of the batch in prompt order; failed ones have ``error`` set.
    """

    def __init__(self, message: str, outputs: list[RequestOutput]) -> None:
        super().__init__(message)
        self.outputs = outputs


def wait_all(outputs: list[RequestOutput], *, show_progress: bool) -> None:
    """Waits until every request is done; failed ones keep their error. The progress bar shows on a terminal only."""
    from lamella.progress import Bar

    hidden = None if show_progress and len(outputs) > 1 else True
    for output in Bar(outputs, desc="Processed requests", disable=hidden):
        try:
            output.result()
        except RequestError:
            continue  # reported with the others when all are done


def raise_failed(outputs: list[RequestOutput]) -> None:
    """Raises BatchError if any of the finished requests failed."""
    failed = [i for i, output in enumerate(outputs) if output.error is not None]
    if failed:
        error = outputs[failed[0]].error
        raise BatchError(
            f"{len(failed)} of {len(outputs)} requests failed, first prompt {failed[0]}: {error}; this error's "
            "`outputs` holds all of them",
            outputs,
        ) from error
