"""Runners of an engine with several ranks: rank 0 sends each plan to the others, then computes its own part.

The local runner is wrapped in a class of its own kind, so the loop treats it as it would the runner of a single rank.
Sampled tokens are the same on every rank, and logits complete on rank 0, so nothing is sent back.

A step that fails before it was sent fails alone. Whatever fails later is fatal, since the other ranks are in the step
already: it becomes a WorkerError that says which rank failed first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import OutOfMemoryError, Tensor

from lamella_core.errors import WorkerError
from lamella_executor.runner.base import LaunchedStep, LaunchingRunner, PipelinedRunner, Runner
from lamella_executor.scheduler.plan import StepPlan
from lamella_executor.worker.channel import STEP
from lamella_executor.worker.plan_wire import PlanEncoder

VERDICT_S = 3.0  # for the watcher to find out which rank failed, when a collective has


class Peers(Protocol):
    """What a step needs of the other ranks; `lamella_executor.worker.crew.Crew`."""

    @property
    def failure(self) -> WorkerError | None: ...

    def set_phase(self, phase: str) -> None: ...

    def expect(self, step: int | None) -> None: ...

    def broadcast_frame(self, kind: int, payload: bytes | memoryview) -> None: ...

    def await_failure(self, timeout_s: float) -> WorkerError | None: ...


class Sender:
    """Sends plans, and turns errors of steps that are under way into fatal ones.

    Args:
        peers: the other ranks.
        tokens_per_block: tokens a KV block holds.
        fail: told of a fatal error of rank 0 itself, before it is raised.
        prepare: called once, by the thread that runs steps, before the first.
    """

    def __init__(
        self,
        peers: Peers,
        tokens_per_block: int,
        fail: Callable[[WorkerError], None],
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self._peers = peers
        self._encoder = PlanEncoder(tokens_per_block)
        self._fail = fail
        self._prepare = prepare
        self._phase = ""
        self.num_sent = 0

    def send(self, plan: StepPlan) -> None:
        """Sends a plan to all other ranks.

        Raises:
            WorkerError: one of them has failed. Other errors: nothing was sent.
        """
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        buffer = self._encoder.encode(plan)
        phase = phase_of(plan)
        if phase != self._phase:
            self._phase = phase
            self._peers.set_phase(phase)
        self._peers.broadcast_frame(STEP, buffer)
        self.num_sent += 1

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around what rank 0 does of a step that was sent: makes its errors fatal ones."""
        try:
            yield
        except WorkerError:
            raise
        except Exception as error:  # noqa: BLE001 - raised again, as what it means for the engine
            fatal = self.explain(error)
            raise fatal from fatal.__cause__  # another rank's failure has none: what it led to here explains nothing

    @contextmanager
    def awaiting(self, step: int) -> Iterator[None]:
        """Around a wait for the results of the ``step``-th plan sent; they may be wrong if a rank failed meanwhile."""
        self._peers.expect(step)
        try:
            with self.computing():
                yield
        finally:
            self._peers.expect(None)
        if self._peers.failure is not None:
            raise WorkerError(*self._peers.failure.args)

    def explain(self, error: Exception) -> WorkerError:
        """Returns the failure of the rank that an error of this one came from, or one of rank 0 with that as cause."""
        is_own = isinstance(error, OutOfMemoryError | MemoryError) or not isinstance(error, RuntimeError)
        failure = self._peers.failure if is_own else self._peers.await_failure(VERDICT_S)
        if failure is not None:
            return WorkerError(*failure.args)
        fatal = WorkerError(
            f"rank 0 failed in phase {self._phase or 'start'}: {type(error).__name__}: {error}; the other ranks were "
            "in the same step and have been stopped"
        )
        fatal.__cause__ = error
        self._fail(fatal)
        return fatal


class DistributedRunner:
    """A `Runner` on every rank."""

    def __init__(self, runner: Runner, sender: Sender) -> None:
        self._runner = runner
        self._sender = sender

    def run(self, plan: StepPlan) -> Tensor:
        """Returns logits [plan.num_logits, vocab_size] float32; see `Runner.run`.

        Raises:
            WorkerError: a rank has failed; the engine cannot go on.
        """
        self._sender.send(plan)
        with self._sender.awaiting(self._sender.num_sent):
            return self._runner.run(plan)


class DistributedStep:
    """A `LaunchedStep` on every rank, as rank 0 sees it."""

    def __init__(self, step: LaunchedStep, number: int, sender: Sender) -> None:
        self._step = step
        self._number = number
        self._sender = sender

    @property
    def logits(self) -> Tensor | None:
        """See `LaunchedStep.logits`."""
        return self._step.logits

    def collect(self) -> list[int]:
        """Waits until the step is done on rank 0 and returns its tokens; see `LaunchedStep.collect`.

        Raises:
            WorkerError: a rank has failed; the engine cannot go on.
        """
        with self._sender.awaiting(self._number):
            return self._step.collect()


class DistributedLaunchingRunner:
    """A `LaunchingRunner` on every rank."""

    def __init__(self, runner: LaunchingRunner | PipelinedRunner, sender: Sender) -> None:
        self._runner = runner
        self._sender = sender

    def launch(self, plan: StepPlan) -> DistributedStep:
        """Enqueues a step on every rank; see `LaunchingRunner.launch`.

        Raises:
            WorkerError: a rank has failed; the engine cannot go on.
        """
        self._sender.send(plan)
        with self._sender.computing():
            return DistributedStep(self._runner.launch(plan), self._sender.num_sent, self._sender)


class DistributedPipelinedRunner(DistributedLaunchingRunner):
    """A `PipelinedRunner` whose stages are other ranks."""

    def __init__(self, runner: PipelinedRunner, sender: Sender) -> None:
        super().__init__(runner, sender)
        self.max_in_flight = runner.max_in_flight
        self.is_sampling = runner.is_sampling


def distribute(runner: Runner | LaunchingRunner | PipelinedRunner, sender: Sender) -> Runner | LaunchingRunner:
    """Returns rank 0's runner as one of all ranks, of the same kind."""
    if isinstance(runner, PipelinedRunner):
        return DistributedPipelinedRunner(runner, sender)
    if isinstance(runner, LaunchingRunner):
        return DistributedLaunchingRunner(runner, sender)
    return DistributedRunner(runner, sender)


def phase_of(plan: StepPlan) -> str:
    """Returns what a step is called in messages: "decode" if every sequence computes one token, else "prefill"."""
    return "decode" if all([item.num_tokens == 1 for item in plan.items]) else "prefill"
