"""GenerationResult: a request as its user holds it; future, awaitable and (async) iterator in one.

The engine loop's thread publishes updates into it; any thread and any event loop may wait on it, several at a time.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from lamella_executor.mailbox import Mailbox
from lamella_executor.request import CompletionOutput, RequestStatus, RequestUpdate

if TYPE_CHECKING:
    from lamella_executor.sampling_params import SamplingParams
    from lamella_executor.sequence import Logprob
    from lamella_executor.stats import RequestMetrics

_WAIT_SLICE_S = (
    0.5  # a waiting main thread looks for Ctrl-C at least this often, also where locks cannot be interrupted
)

Wake = Callable[[], object]  # rouses one waiting thread or task; called once, by the loop's thread


class GenerationResult:
    """One submitted request.

    Wait with ``result(timeout)``, ``await``, ``for`` or ``async for``. Iterating a streaming request yields this same
    object each time something is new; ``outputs`` then holds everything so far and each output's ``*_diff`` what is
    new since the last yield. Steps that come faster than the reader are merged, none is lost. Between two yields
    ``outputs`` does not change. Several iterators may run over one result: each sees it grow, but they share one set of
    differences.

    Dropping the object does not abort the request; `abort` does.
    """

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        mailbox: Mailbox,
        *,
        streaming: bool = False,
    ) -> None:
        """Made by the executor; users get it from ``generate_async``."""
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.streaming = streaming
        self._mailbox = mailbox
        # The loop's thread writes what is published, without a lock (see `publish`).
        self._waiters: deque[Wake] = deque()
        self._status = RequestStatus.QUEUED
        self._version = 0  # grows when outputs are published, and with the terminal state
        self._published: list[CompletionOutput] = []  # newest outputs
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._error: Exception | None = None
        self._metrics: RequestMetrics | None = None
        # The readers' side.
        self._reading = threading.RLock()
        self._taken = self._published  # what `_outputs` was made of
        self._outputs: list[CompletionOutput] = []
        self._num_iterators = 0  # running now

    # -- what is known now

    @property
    def status(self) -> RequestStatus:
        return self._status

    @property
    def done(self) -> bool:
        """Whether a terminal state is reached."""
        return self._status.is_terminal

    @property
    def error(self) -> Exception | None:
        """Why the request failed; None unless its status is FAILED."""
        return self._error

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The samples or beams, ``params.n`` at the end; while somebody iterates, as of the last yield."""
        if not self._num_iterators:
            self._take()
        return self._outputs

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """One entry per prompt token (the first is None) once the prompt is computed, if asked for."""
        return self._prompt_logprobs

    @property
    def metrics(self) -> RequestMetrics | None:
        """Times of the request, once it is done."""
        return self._metrics

    # -- waiting

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Waits until the request is done and returns this object.

        Args:
            timeout: seconds in total; None waits for ever.

        Raises:
            TimeoutError: not done in time; the request goes on and can be waited for again.
            RequestError: the request failed; StepError if the step it was in failed.
            EngineDeadError: the engine stopped before the request was done.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            seen = self._version
            left = _WAIT_SLICE_S if deadline is None else deadline - time.monotonic()
            if not self.done and left <= 0:
                raise self._timeout_error(timeout)
            self._wait_newer(seen, left)
        return self._conclude()

    async def aresult(self, timeout: float | None = None) -> GenerationResult:
        """Like `result`, without blocking the running event loop."""
        try:
            await asyncio.wait_for(self._until_done(), timeout)
        except asyncio.TimeoutError:  # not the built-in TimeoutError before Python 3.11
            raise self._timeout_error(timeout) from None
        return self._conclude()

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[GenerationResult]:
        self._count_iterators(+1)
        try:
            seen, is_last = 0, False
            while not is_last:
                while self._version == seen:
                    self._wait_newer(seen, _WAIT_SLICE_S)
                seen, is_last = self._advance()
                yield self
        finally:
            self._count_iterators(-1)

    async def __aiter__(self) -> AsyncIterator[GenerationResult]:
        self._count_iterators(+1)
        try:
            seen, is_last = 0, False
            while not is_last:
                while self._version == seen:
                    await self._until_newer(seen)
                seen, is_last = self._advance()
                yield self
        finally:
            self._count_iterators(-1)

    def abort(self) -> None:
        """Asks the engine to cancel the request; returns at once. Does nothing once it is done."""
        if not self.done:
            self._mailbox.abort(self.request_id)

    # -- the engine's side

    def publish(self, update: RequestUpdate) -> None:
        """Takes an update of the loop and wakes every waiter; only the loop's thread calls it.

        It takes no lock, for a reader stopped by Ctrl-C could leave it held and hang the engine. Fields are written in
        the order in which readers may rely on them: outputs, then status, then version.
        """
        if self._status.is_terminal:
            raise RuntimeError(f"request {self.request_id} is {self._status.value} already")
        if update.status is not self._status and not self._status.may_become(update.status):
            raise RuntimeError(
                f"request {self.request_id}: no transition from {self._status.value} to {update.status.value}"
            )
        if update.outputs is not None:
            self._published = update.outputs
        if update.prompt_logprobs is not None:
            self._prompt_logprobs = update.prompt_logprobs
        self._error, self._metrics = update.error, update.metrics
        self._status = update.status
        if update.outputs is None and not self.done:
            return
        self._version += 1
        for _ in range(len(self._waiters)):  # not those that join meanwhile: they may have seen this version
            try:
                wake = self._waiters.popleft()
            except IndexError:  # it gave up waiting
                break
            try:
                wake()
            except RuntimeError:  # its event loop was closed; nobody waits there any more
                continue

    # -- the readers' side

    def _count_iterators(self, change: int) -> None:
        with self._reading:
            self._num_iterators += change

    def _take(self) -> None:
        """Moves the newest published outputs to the readers' side."""
        with self._reading:
            published = self._published
            if published is not self._taken:
                shown = {output.index: output for output in self._outputs}
                self._outputs = [output.after(shown.get(output.index)) for output in published]
                self._taken = published

    def _advance(self) -> tuple[int, bool]:
        """Takes what is new; returns its version, and whether the request is done. Raises its error if it failed."""
        with self._reading:
            seen, is_last = self._version, self.done
            self._take()
        if is_last:
            self._conclude()
        return seen, is_last

    def _conclude(self) -> GenerationResult:
        if self._error is not None:
            error = copy.copy(self._error)  # each waiter raises its own: tracebacks are written into the object
            error.__cause__ = self._error.__cause__
            raise error
        self._take()
        return self

    async def _until_done(self) -> None:
        while True:
            seen = self._version
            if self.done:
                return
            await self._until_newer(seen)

    async def _until_newer(self, seen: int) -> None:
        """Returns once the version differs from ``seen``; a wake may come early, so look again."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        wake = functools.partial(loop.call_soon_threadsafe, _resolve, future)
        self._waiters.append(wake)
        try:
            if self._version == seen:  # looked at after joining the waiters: what is published now wakes this one
                self._mailbox.check_wait()
                await future
        finally:
            self._stop_waiting(wake)

    def _wait_newer(self, seen: int, timeout: float) -> None:
        """Returns once the version differs from ``seen``, after ``timeout`` seconds or a slice, or on an early wake."""
        lock = threading.Lock()
        lock.acquire()
        self._waiters.append(lock.release)
        try:
            if self._version == seen:
                self._mailbox.check_wait()
                lock.acquire(timeout=min(timeout, _WAIT_SLICE_S))
        finally:
            self._stop_waiting(lock.release)

    def _stop_waiting(self, wake: Wake) -> None:
        try:
            self._waiters.remove(wake)
        except ValueError:  # it was woken
            return

    def _timeout_error(self, timeout: float | None) -> TimeoutError:
        return TimeoutError(
            f"request {self.request_id} is {self._status.value} after {timeout} s; it goes on: wait again or abort() it"
        )

    def __repr__(self) -> str:
        return f"GenerationResult(request_id={self.request_id}, status={self._status.value!r}, outputs={self._outputs})"


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
