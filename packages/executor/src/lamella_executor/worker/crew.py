"""Crew: rank 0's handle on all other ranks of one engine."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping

import msgspec

from lamella_core.checks import check_number
from lamella_core.errors import WorkerError
from lamella_executor.worker.channel import MESSAGE
from lamella_executor.worker.judge import START_TIMEOUT_S
from lamella_executor.worker.member import Member
from lamella_executor.worker.messages import Message, Setup
from lamella_executor.worker.process import Launcher
from lamella_executor.worker.watch import Watch

DROP_GRACE_S = 1.0  # for workers whose crew was dropped without a stop
_BROKEN_PIPE_S = 5.0  # for the watcher to find out why a worker no longer takes messages

_encode = msgspec.msgpack.Encoder().encode


class Crew:
    """The workers of one engine: ranks 1 to world_size - 1, their channels, and the thread that watches them.

    A failure of one worker ends all: the watcher kills the rest, then calls ``on_failure``, and every method that needs
    them raises the failure. A crew that is dropped, or alive when the interpreter ends, stops its workers.
    """

    def __init__(
        self,
        launcher: Launcher,
        setup: Setup,
        *,
        worker_timeout_s: float,
        on_failure: Callable[[WorkerError], None],
        stall_timeout_s: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the workers and waits until each has said Hello.

        Args:
            launcher: how to start them; the crew closes it at its end.
            setup: rank 0's; each worker gets its own rank, and the device that the launcher has for it.
            worker_timeout_s: silence of a worker that counts as its death.
            on_failure: called once, on the watcher's thread, after all workers were killed. Must not hold the crew.
            stall_timeout_s: see `expect`; None: ``worker_timeout_s``.
            environment: added to the workers'.

        Raises:
            ConfigError: a timeout is no positive number.
            WorkerError: a worker could not be started, died, or said nothing; none is left.
        """
        check_number("worker_timeout_s", worker_timeout_s, positive=True)
        stall_timeout_s = worker_timeout_s if stall_timeout_s is None else stall_timeout_s
        check_number("stall_timeout_s", stall_timeout_s, positive=True)
        self._watch = Watch(
            launcher,
            range(1, setup.world_size),
            environment or {},
            timeout_s=worker_timeout_s,
            stall_timeout_s=stall_timeout_s,
            on_failure=on_failure,
        )
        self._release = weakref.finalize(self, self._watch.request_stop, DROP_GRACE_S)
        self._release.atexit = False  # the watch ends itself then, and is waited for
        try:
            self._watch.start()
            self._greet(setup, launcher)
        except BaseException:
            self.stop(timeout_s=1.0)
            raise

    def _greet(self, setup: Setup, launcher: Launcher) -> None:
        watch = self._watch
        watch.wait_until(lambda: watch.launched, threading.TIMEOUT_MAX)
        error, watch.launch_error = watch.launch_error, None
        if error is not None:
            raise error
        self.wait_ready("hello", START_TIMEOUT_S)
        for member in watch.members:
            rank = member.rank
            mapping = {**setup.mapping, "rank": rank}
            index = launcher.device_indices[rank]
            own = msgspec.structs.replace(setup, rank=rank, mapping=mapping, device_index=index)
            self._send(member, MESSAGE, _encode(own))

    @property
    def failure(self) -> WorkerError | None:
        """What ended the workers, if one failed."""
        return self._watch.failure

    def set_phase(self, phase: str) -> None:
        """Says what the engine is at ("load", "start", "prefill", "decode"), for messages; costs nothing."""
        self._watch.set_phase(phase)

    def expect(self, step: int | None) -> None:
        """Says that rank 0 waits for all workers to have done ``step`` steps (`Heartbeat.step`); None: for nothing.

        Workers that stay behind for longer than ``stall_timeout_s``, without getting on by a step, count as failed.
        """
        self._watch.expect(step)

    def broadcast(self, message: Message) -> None:
        """Sends a message to all workers.

        Raises:
            WorkerError: a worker has failed, or all were stopped.
        """
        self.broadcast_frame(MESSAGE, _encode(message))

    def broadcast_frame(self, kind: int, payload: bytes | memoryview) -> None:
        """Sends raw bytes to all workers; errors as those of `broadcast`."""
        self._check()
        for member in self._watch.members:
            self._send(member, kind, payload)

    def _send(self, member: Member, kind: int, payload: bytes | memoryview) -> None:
        try:
            member.process.channel.send_frame(kind, payload)
        except OSError as error:
            if self.await_failure(_BROKEN_PIPE_S) is None:
                self._watch.condemn(WorkerError(f"{member.name} takes no messages any more: {error}"))
            self._check()

    def _check(self) -> None:
        """Raises what has ended the workers, if something has.

        Each time as a new error: tracebacks would pile up in one, and hold the frames of all who have seen it.
        """
        if self._watch.failure is not None:
            raise WorkerError(*self._watch.failure.args)
        if self._watch.is_stopping:
            raise WorkerError("the workers were stopped")

    def wait_ready(self, phase: str, timeout_s: float) -> None:
        """Waits until every worker has said Ready(phase), once for each call.

        Raises:
            WorkerError: one failed, or was not ready after ``timeout_s``; then all are killed.
        """
        members = self._watch.members
        self._watch.wait_until(lambda: all(phase in member.ready for member in members), timeout_s)
        self._check()
        late = [member for member in members if phase not in member.ready]
        if late:
            where = "; ".join(f"{member.name} at {member.place or 'its start'}" for member in late)
            self._watch.condemn(WorkerError(f"not ready with {phase} after {timeout_s:g} s: {where}"))
            self._check()
        for member in members:
            member.ready.remove(phase)

    def await_failure(self, timeout_s: float) -> WorkerError | None:
        """Returns the failure, giving the watcher time to find it: for who was just let down by a collective."""
        self._watch.wait_until(lambda: False, timeout_s)
        return self._watch.failure

    def stop(self, timeout_s: float) -> None:
        """Tells the workers to end, kills those that have not within ``timeout_s``, and closes everything. Idempotent.

        Called on the watcher's thread (by ``on_failure``) it does not wait.
        """
        if self._watch.stop(timeout_s):
            self._release.detach()
