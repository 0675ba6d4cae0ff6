"""EngineLoop: one step after another; schedule -> forward -> sample -> update.

Three kinds of errors. A request's (bad logits, a logits processor or decoder that raises): only it fails. A step's (the
forward pass raises): the requests in it fail with StepError, their blocks are not reused, the rest goes on. Whatever
else leaves `EngineLoop.step` is fatal; `EngineThread` tells every waiter.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch

from lamella_core.errors import RequestError, StepError
from lamella_executor.active import ActiveRequest
from lamella_executor.failures import detach
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.mailbox import Submit
from lamella_executor.request import RequestStatus
from lamella_executor.runner.base import Runner
from lamella_executor.sampler.logprobs import prompt_logprobs
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.sampler.types import SampleResult, SampleRow
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.sequence import RequestState
from lamella_executor.stats import IterationStats, StatsBuffer
from lamella_executor.update import advance_sequences

logger = logging.getLogger(__name__)

_MAX_EMPTY_STEPS = 100  # in a row with work waiting; then the scheduler is stuck and the engine had better die


class EngineLoop:
    """The engine's heart. One thread owns it and everything it holds."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, kv: KvCacheManager, sampler: Sampler, stats: StatsBuffer
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._kv = kv
        self._sampler = sampler
        self._stats = stats
        self._active: dict[int, ActiveRequest] = {}
        self._iteration = 0
        self._num_empty_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._active)

    def submit(self, command: Submit) -> None:
        """Queues a request; one that the scheduler refuses fails."""
        active = ActiveRequest(command.request, command.result)
        try:
            self._scheduler.add(command.request)
        except RequestError as error:
            active.fail(error)
        else:
            self._active[command.request.request_id] = active

    def abort(self, request_id: int) -> None:
        """Cancels a request; what it generated is kept. Unknown ids are ignored."""
        active = self._active.get(request_id)
        if active is not None:
            self._finish(active, RequestStatus.CANCELLED)

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """Fails every request with an error of its own; the loop is not used afterwards."""
        for active in self._active.values():
            if not active.is_done:
                active.fail(make_error())
        self._active.clear()

    @torch.inference_mode()
    def step(self) -> None:
        """Computes one step and reports it."""
        started = time.monotonic()
        plan = self._scheduler.schedule()
        self._report_states(plan)
        if not plan.items:
            self._count_empty_step()
            return
        num_generation = sum(item.num_tokens for item in plan.items if item.start >= item.sequence.num_prompt_tokens)
        outcome = _forward(self._runner, plan)
        computed = time.monotonic()
        if isinstance(outcome, Exception):
            self._fail_step(plan, outcome)
        else:
            self._scheduler.advance(plan)
            self._update(self._sampled_rows(plan, outcome), outcome)
        self._record(plan, num_generation, started, computed)

    # -- parts of a step

    def _report_states(self, plan: StepPlan) -> None:
        self._num_empty_steps = 0 if plan.items else self._num_empty_steps
        for request in plan.paused:
            self._active[request.request_id].pause()
        for item in plan.items:
            self._active[item.request.request_id].run()

    def _count_empty_step(self) -> None:
        self._num_empty_steps += 1
        if self._num_empty_steps > _MAX_EMPTY_STEPS:
            raise RuntimeError(
                f"no progress: {len(self._scheduler.waiting)} requests wait and {len(self._scheduler.running)} run, "
                f"but the scheduler plans nothing; KV cache: {self._kv.stats()}"
            )

    def _sampled_rows(self, plan: StepPlan, logits: torch.Tensor) -> list[SampleRow]:
        """Reads prompt log-probabilities off the logits; returns the requests to be sampled, in row order."""
        rows: dict[int, SampleRow] = {}
        first_row = 0
        for item in plan.items:
            request = item.request
            if item.num_logits:
                _read_prompt_logprobs(item, logits[first_row : first_row + item.num_logits])
            first_row += item.num_logits
            if item.is_sampled and request.request_id not in rows:
                rows[request.request_id] = SampleRow(request, first_row - 1)
        return list(rows.values())

    def _update(self, rows: list[SampleRow], logits: torch.Tensor) -> None:
        """Samples, appends the new tokens, and ends or reports each request."""
        now = time.monotonic()
        for row, outcome in zip(rows, self._sampler.sample(rows, logits)):
            active = self._active[row.request.request_id]
            active.count_token(now)
            error = self._append(row.request, outcome)
            if error is not None:
                self._fail(active, error)
            elif not row.request.sequences or outcome.is_done:
                self._finish(active, RequestStatus.FINISHED)
            else:
                error = active.report()
                if error is not None:
                    self._fail(active, error)

    def _append(self, request: RequestState, outcome: SampleResult) -> RequestError | None:
        if outcome.error is not None:
            return _as_request_error(outcome.error)
        if outcome.is_done:
            return None
        try:
            advance_sequences(request, outcome.continuations, self._kv)
        except RequestError as error:
            return error
        return None

    def _finish(self, active: ActiveRequest, status: RequestStatus) -> None:
        """Takes a request out with its outputs. It stays known until its user has been told, whatever happens here."""
        self._scheduler.finish(active.request)
        active.conclude(status)
        del self._active[active.request.request_id]

    def _fail(self, active: ActiveRequest, error: RequestError) -> None:
        """Takes a request out; its blocks are freed, and nobody reuses them."""
        self._scheduler.finish(active.request, cache=False)
        active.fail(error)
        del self._active[active.request.request_id]

    def _fail_step(self, plan: StepPlan, cause: Exception) -> None:
        """Fails the requests whose cache contents this step was to make."""
        requests = _touched(plan, self._scheduler.running)
        logger.error("a step failed, %d requests fail with it\n%s", len(requests), detach(cause))
        for request in requests:
            error = StepError(f"the step that computed this request failed with {type(cause).__name__}: {cause}")
            error.__cause__ = cause
            self._fail(self._active[request.request_id], error)

    def _record(self, plan: StepPlan, num_generation: int, started: float, computed: float) -> None:
        kv = self._kv.stats()
        ended = time.monotonic()
        self._iteration += 1
        self._stats.append(
            IterationStats(
                iteration=self._iteration,
                timestamp_s=time.time(),
                latency_s=ended - started,
                forward_s=computed - started,
                num_queued=len(self._scheduler.waiting),
                num_running=len(self._scheduler.running),
                num_paused=len(plan.paused),
                num_context_tokens=plan.num_tokens - num_generation,
                num_generation_tokens=num_generation,
                num_live_blocks=kv.num_live,
                num_cached_blocks=kv.num_cached,
                num_free_blocks=kv.num_free,
            )
        )


def _forward(runner: Runner, plan: StepPlan) -> torch.Tensor | Exception:
    try:
        return runner.run(plan)
    except Exception as error:  # noqa: BLE001 - a failing forward ends its requests, not the engine
        return error


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


def _touched(plan: StepPlan, running: Iterable[RequestState]) -> list[RequestState]:
    """Returns the plan's requests, and others that hold a block which the plan was to fill by copying."""
    copied = {destination for _, destination in plan.block_copies}
    touched = {item.request.request_id: item.request for item in plan.items}
    for request in running:
        if any(not copied.isdisjoint(sequence.blocks) for sequence in request.sequences):
            touched[request.request_id] = request
    return list(touched.values())


def _as_request_error(error: Exception) -> RequestError:
    if error.__cause__ is not None:
        detach(error.__cause__)
    error.__traceback__ = None
    return error if isinstance(error, RequestError) else RequestError(str(error))
