"""EngineLoop: one step after another; schedule -> launch -> collect -> update.

A `Runner` computes a step in its launch, and each step is collected at once: tokens are chosen, requests go on or end.

A `LaunchingRunner` computes while the loop goes on, and is kept one step ahead: step n + 1 is planned and launched
while n is still computed, then n is collected. Its plan counts on a `PENDING_TOKEN` for each request of n that the
runner samples; a request that turns out to have ended with n (a stop token, say) has a row too many in n + 1, which is
dropped when that is collected. A step with logits for the host to sample (penalties, log-probabilities, beams, several
samples) is collected right after its launch; its other rows are sampled by the runner like always.

A `PipelinedRunner` has several steps in flight, each of other requests: the oldest is collected when there are as many
as the runner takes, or when nothing more can be planned without its results.

Three kinds of errors. A request's (bad logits, a logits processor or decoder that raises): only it fails. A step's (its
launch raises): the requests in it fail with StepError, their blocks are not reused, the rest goes on, the step before
it is still collected. Whatever else leaves `EngineLoop.step` is fatal, and `EngineThread` tells every waiter: a failing
`LaunchedStep.collect`, a launch that fails in a pipeline, the WorkerError of another rank.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lamella_core.errors import RequestError, StepError, WorkerError
from lamella_executor.active import ActiveRequest, Roster
from lamella_executor.failures import detach
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.mailbox import Submit
from lamella_executor.request import RequestStatus
from lamella_executor.runner.base import LaunchedStep, LaunchingRunner, PipelinedRunner, Runner
from lamella_executor.sampler.device import is_device_sampled
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.sequence import RequestState
from lamella_executor.stats import IterationStats, StatsBuffer
from lamella_executor.update import Updater

logger = logging.getLogger(__name__)

_MAX_EMPTY_STEPS = 100  # in a row with work waiting; then the scheduler is stuck and the engine had better die


@dataclass(frozen=True, slots=True)
class _Computed:
    """The `LaunchedStep` of a `Runner`: done, and nothing sampled."""

    logits: torch.Tensor  # [plan.num_logits, vocab_size] float32

    def collect(self) -> list[int]:
        return []


@dataclass(frozen=True, slots=True)
class _Launch:
    """A step whose results are still to be taken."""

    plan: StepPlan
    step: LaunchedStep
    device_items: list[ScheduledSequence]  # those whose tokens `step.collect` returns
    has_host_rows: bool  # logits for the host to read
    started_s: float  # time.monotonic() before the launch
    launch_s: float  # seconds the launch took


@dataclass(slots=True)
class _Times:
    """Seconds of one iteration; see `IterationStats`."""

    forward_s: float = 0.0
    wait_s: float = 0.0


class EngineLoop:
    """The engine's heart. One thread owns it and everything it holds."""

    def __init__(
        self,
        runner: Runner | LaunchingRunner | PipelinedRunner,
        scheduler: Scheduler,
        kv: KvCacheManager,
        sampler: Sampler,
        stats: StatsBuffer,
    ) -> None:
        """Connects the parts; what kind of runner it gets decides how steps overlap.

        Args:
            runner: computes steps.
            scheduler: plans them, over ``kv``; in as many micro-batches as the runner takes.
            kv: block tables.
            sampler: chooses tokens that the runner does not.
            stats: takes the numbers of each iteration.
        """
        self._runner = runner
        self._is_overlapped = isinstance(runner, LaunchingRunner)
        self._is_sampling = self._is_overlapped
        self._num_batches = 1  # steps, each of other requests, that may be in flight
        if isinstance(runner, PipelinedRunner):
            self._num_batches, self._is_sampling = runner.max_in_flight, runner.is_sampling
        self._scheduler = scheduler
        self._kv = kv
        self._stats = stats
        self._roster = Roster(scheduler)
        self._updater = Updater(self._roster, kv, sampler)
        self._launches: deque[_Launch] = deque()  # not collected, the oldest first
        self._iteration = 0
        self._num_empty_steps = 0
        self.needs_host = False  # whether a step for a device is being planned or launched, or its results taken

    @property
    def has_work(self) -> bool:
        return bool(self._roster) or bool(self._launches)

    def submit(self, command: Submit) -> None:
        """Queues a request; one that the scheduler refuses fails."""
        active = ActiveRequest(command.request, command.result)
        try:
            self._scheduler.add(command.request)
        except RequestError as error:
            active.fail(error)
        else:
            self._roster.add(active)

    def abort(self, request_id: int) -> None:
        """Cancels a request; what it generated is kept. Unknown ids are ignored."""
        active = self._roster.find(request_id)
        if active is not None:
            self._roster.finish(active, RequestStatus.CANCELLED)

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """Fails every request with an error of its own; the loop is not used afterwards.

        Then waits for the steps in flight, whose memory may be given back after this.
        """
        self._roster.fail_all(make_error)
        while self._launches:
            try:
                self._launches.popleft().step.collect()
            except Exception as error:  # noqa: BLE001 - nobody waits for its results, and the engine may be broken
                logger.debug("the last step failed: %s", detach(error))

    def abandon(self, make_error: Callable[[], Exception]) -> None:
        """Fails every request while the loop's thread hangs in a step; the only method for other threads."""
        self._roster.abandon(make_error)

    @torch.inference_mode()
    def step(self) -> None:
        """Launches one step and takes the results of what must not stay in flight."""
        self.needs_host = self._is_overlapped
        try:
            self._step()
        finally:
            self.needs_host = False

    def _step(self) -> None:
        started = time.monotonic()
        plan = self._scheduler.schedule()
        self._report_states(plan)
        if not plan.items and not self._launches:
            self._count_empty_step()
            return
        num_generation = sum([item.num_tokens for item in plan.items if item.start >= item.sequence.num_prompt_tokens])
        failure = self._launch(plan) if plan.items else None
        num_kept, times = self._num_kept(plan), _Times()
        while len(self._launches) > num_kept:
            self._collect(self._launches.popleft(), times)
        if failure is not None:
            self._fail_step(plan, failure)
        self._record(plan, num_generation, started, times)

    # -- parts of a step

    def _report_states(self, plan: StepPlan) -> None:
        for request in plan.paused:
            active = self._roster.of(request)
            if active is not None:
                active.pause()
        for request in plan.started:
            active = self._roster.of(request)
            if active is not None:
                active.run()

    def _count_empty_step(self) -> None:
        self._num_empty_steps += 1
        if self._num_empty_steps > _MAX_EMPTY_STEPS:
            raise RuntimeError(
                f"no progress: {len(self._scheduler.waiting)} requests wait and {len(self._scheduler.running)} run, "
                f"but the scheduler plans nothing; KV cache: {self._kv.stats()}"
            )

    def _launch(self, plan: StepPlan) -> Exception | None:
        """Launches a step and records that its tokens are computed; returns the error if that failed."""
        self._num_empty_steps = 0
        started = time.monotonic()
        step = _launch(self._runner, plan)
        launch_s = time.monotonic() - started
        if isinstance(step, Exception):
            if self._num_batches > 1:
                raise step
            return step
        device_items: list[ScheduledSequence] = []
        if self._is_sampling:
            device_items = [item for item in plan.items if item.is_sampled and is_device_sampled(item.request)]
        self._scheduler.advance(plan)
        self._scheduler.expect(device_items)
        if self._num_batches > 1:
            self._scheduler.hold(plan)
        has_host_rows = plan.num_logits > len(device_items)  # one for each of those
        self._launches.append(_Launch(plan, step, device_items, has_host_rows, started, launch_s))
        return None

    def _num_kept(self, plan: StepPlan) -> int:
        """Returns how many launched steps may stay in flight now.

        One that runs ahead of the host may, unless the host must look at its logits before anything else is planned. Of
        a pipeline's steps all may but one if a plan was made (the next one will follow); else the oldest is waited for.
        """
        if self._num_batches > 1:
            return self._num_batches - 1 if plan.items else len(self._launches) - 1
        newest = self._launches[-1] if self._is_overlapped and self._launches else None
        return 1 if newest is not None and newest.plan is plan and not newest.has_host_rows else 0

    def _collect(self, launch: _Launch, times: _Times) -> None:
        """Waits for a step and takes its results."""
        began = time.monotonic()
        self.needs_host = False
        tokens = launch.step.collect()
        self.needs_host = self._is_overlapped
        now = time.monotonic()
        if self._num_batches > 1:
            self._scheduler.release(launch.plan)
        times.wait_s += now - began if self._is_overlapped else launch.launch_s
        times.forward_s += now - launch.started_s if self._is_overlapped else launch.launch_s
        self._updater.take_tokens(launch.device_items, tokens, now)
        if launch.has_host_rows and launch.step.logits is not None:
            self._updater.take_logits(launch.plan, launch.device_items, launch.step.logits, now)

    def _fail_step(self, plan: StepPlan, cause: Exception) -> None:
        """Fails the requests whose cache contents this step was to make."""
        found = [self._roster.of(request) for request in _touched(plan, self._scheduler.running)]
        touched = [active for active in found if active is not None]  # the others ended with the step before
        logger.error("a step failed, %d requests fail with it\n%s", len(touched), detach(cause))
        for active in touched:
            error = StepError(f"the step that computed this request failed with {type(cause).__name__}: {cause}")
            error.__cause__ = cause
            self._roster.fail(active, error)

    def _record(self, plan: StepPlan, num_generation: int, started: float, times: _Times) -> None:
        kv = self._kv.stats()
        ended = time.monotonic()
        self._iteration += 1
        self._stats.append(
            IterationStats(
                iteration=self._iteration,
                timestamp_s=time.time(),
                latency_s=ended - started,
                forward_s=times.forward_s,
                wait_s=times.wait_s,
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


def _launch(runner: Runner | LaunchingRunner | PipelinedRunner, plan: StepPlan) -> LaunchedStep | Exception:
    try:
        return runner.launch(plan) if isinstance(runner, LaunchingRunner) else _Computed(runner.run(plan))
    except WorkerError:
        raise
    except Exception as error:  # noqa: BLE001 - a failing step ends its requests, not the engine
        return error


def _touched(plan: StepPlan, running: Iterable[RequestState]) -> list[RequestState]:
    """Returns the plan's requests, and others that hold a block or a slot which the plan was to fill by copying."""
    copied = {destination for _, destination in plan.block_copies}
    slots = {destination for _, destination in plan.state_copies}
    touched = {item.request.request_id: item.request for item in plan.items}
    for request in running:
        if any(s.state_slot in slots or not copied.isdisjoint(s.blocks) for s in request.sequences):
            touched[request.request_id] = request
    return list(touched.values())
