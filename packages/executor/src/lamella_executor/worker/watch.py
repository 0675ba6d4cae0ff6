"""Watch: the thread of rank 0 that reads what workers say and notices when one dies, fails, falls silent or hangs."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping

from lamella_core.errors import WorkerError
from lamella_executor.exit import wait_at_exit
from lamella_executor.worker.channel import ChannelError, ChannelTimeout
from lamella_executor.worker.judge import SETTLE_UNKNOWN_S, Judge
from lamella_executor.worker.member import Member
from lamella_executor.worker.messages import Stop
from lamella_executor.worker.process import Launcher

logger = logging.getLogger(__name__)

REAP_TIMEOUT_S = 3.0  # from SIGKILL until a process has ended; a driver may hold it
EXIT_GRACE_S = 0.5  # for workers to end by themselves, when the interpreter ends
EXIT_TIMEOUT_S = 3.0  # for everything, then
TICK_S = 0.25
BUSY_TICK_S = 0.02  # while an end is awaited
MESSAGES_AT_ONCE = 256  # of one worker, so that one that talks without end does not hide the others
_numbers = itertools.count(1)  # for thread names only


class _Bell:
    """Wakes a selector once and for good; rung by any thread, or by a garbage collection: it takes no lock."""

    def __init__(self) -> None:
        self._heard, rope = socket.socketpair()
        self._rope = [rope]  # who takes it out rings

    def fileno(self) -> int:
        return self._heard.fileno()

    def ring(self) -> None:
        try:
            rope = self._rope.pop()
        except IndexError:
            return
        with contextlib.suppress(OSError):
            rope.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold a copy, so closing is not enough
        rope.close()

    def close(self) -> None:
        self.ring()
        self._heard.close()


class Watch:
    """Owns the thread, the workers' processes, the receiving side of their channels, and the launcher.

    Holds nothing that leads back to the crew, so that dropping the crew can end it. After a failure or a stop it kills
    what is left, reaps and closes everything, and ends.

    Attributes:
        failure: what ended the watch, if something failed; set once.
        launch_error: why no worker could be started; set once.
        launched: all processes were started, `members` is complete.
        ended: nothing is left.
    """

    def __init__(
        self,
        launcher: Launcher,
        ranks: range,
        environment: Mapping[str, str],
        *,
        timeout_s: float,
        stall_timeout_s: float,
        on_failure: Callable[[WorkerError], None],
    ) -> None:
        self.members: tuple[Member, ...] = ()
        self.failure: WorkerError | None = None
        self.launch_error: BaseException | None = None
        self.launched = False
        self.ended = False
        self._judge = Judge(timeout_s=timeout_s, stall_timeout_s=stall_timeout_s)
        self._launcher = launcher
        self._launch = functools.partial(launcher.launch, ranks, environment)
        self._tick_s = min(TICK_S, timeout_s / 4)
        self._on_failure: Callable[[WorkerError], None] | None = on_failure
        self._verdict: WorkerError | None = None  # passed by another thread
        self._stop_by: float | None = None
        self._owner_pid = os.getpid()
        self._changed = threading.Condition()
        self._bell = _Bell()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name=f"lamella-watch-{next(_numbers)}", daemon=True)

    def start(self) -> None:
        """Starts the thread, which starts the workers: a Ctrl-C does not reach it halfway through."""
        atexit.register(self._stop_at_exit)
        self._thread.start()

    # ---- for other threads

    @property
    def is_stopping(self) -> bool:
        return self._stop_by is not None or self.ended

    def set_phase(self, phase: str) -> None:
        """Says what the engine is at, for messages."""
        self._judge.phase = phase

    def expect(self, step: int | None) -> None:
        """Says which step rank 0 waits for all workers to have done, from now on; None when it waits for none."""
        self._judge.expected = None if step is None else (step, time.monotonic())

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until ``condition`` holds, the watch has failed or ended; returns whether one is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self.failure is not None or self.ended or condition(), timeout_s)

    def condemn(self, error: WorkerError) -> None:
        """Ends everything for a reason that another thread found; returns when `failure` is set."""
        self._verdict = error
        self._bell.ring()
        self.wait_until(lambda: False, SETTLE_UNKNOWN_S)

    def request_stop(self, grace_s: float) -> None:
        """Tells the workers to end within ``grace_s``, then kills them; does not wait. Safe in a garbage collection."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the user's process: the workers are not its own
        stop_by = time.monotonic() + grace_s
        self._stop_by = stop_by if self._stop_by is None else min(self._stop_by, stop_by)
        self._bell.ring()

    def stop(self, timeout_s: float, grace_s: float | None = None) -> bool:
        """Stops and waits; returns whether nothing is left after ``timeout_s``. Idempotent.

        Workers have ``grace_s`` to end by themselves; None: most of ``timeout_s``.
        """
        self.request_stop(max(timeout_s / 2, timeout_s - 1.0) if grace_s is None else grace_s)
        if os.getpid() != self._owner_pid or threading.current_thread() is self._thread:
            return False
        with self._changed:
            ended = self._changed.wait_for(lambda: self.ended, timeout_s)
        if not ended:
            logger.warning("workers have not ended %.1f s after they were stopped", timeout_s)
            return False
        self._thread.join()
        return True

    def _stop_at_exit(self) -> None:
        wait_at_exit(lambda rest_s: self.stop(rest_s, min(EXIT_GRACE_S, rest_s)), EXIT_TIMEOUT_S)

    # ---- the thread

    def _run(self) -> None:
        try:
            try:
                verdict = self._watch() if self._start_workers() else None
            except BaseException as error:  # workers that nobody watches must not live on
                logger.exception("the watcher failed")
                verdict = WorkerError(f"watching the workers failed: {type(error).__name__}: {error}")
            if verdict is not None:
                self._fail(verdict)
            else:
                self._ask_to_stop()
        finally:
            self._end()

    def _start_workers(self) -> bool:
        """Starts them, unless a stop was asked for already; returns whether they run."""
        try:
            processes = self._launch() if self._stop_by is None else []
        except BaseException as error:  # noqa: BLE001 - raised again by who waits for it
            self.launch_error = error
            return False
        now = time.monotonic()
        self.members = self._judge.members = tuple(Member(process, now, now) for process in processes)
        self._selector.register(self._bell, selectors.EVENT_READ)
        for member in self.members:
            self._selector.register(member.process.channel, selectors.EVENT_READ, member)
            output = member.process.output_fileno()
            if output is not None:
                self._selector.register(output, selectors.EVENT_READ, member.process)
        with self._changed:
            self.launched = True
            self._changed.notify_all()
        return True

    def _watch(self) -> WorkerError | None:
        """Reads and judges until something fails (returned) or a stop is asked for (None)."""
        last = time.monotonic()
        while self._stop_by is None:
            self._read(BUSY_TICK_S if self._judge.is_settling else self._tick_s)
            now = time.monotonic()
            if now - last > 2 * self._tick_s:  # this process itself was stopped, or short of a core: nobody's silence
                self._judge.forgive(now - last)
            last = now
            verdict = self._verdict or self._find_fault(now)
            if verdict is not None and self._stop_by is None:
                return verdict
        return None

    def _read(self, timeout_s: float) -> None:
        """Takes in all that workers have sent; waits up to ``timeout_s`` for something to come."""
        changed = False
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, Member):
                changed = True
                self._read_channel(key.data)
            elif key.data is None:
                self._selector.unregister(self._bell)
            elif not key.data.forward_output():
                self._selector.unregister(key.fd)
        if changed:
            with self._changed:
                self._changed.notify_all()

    def _read_channel(self, member: Member) -> None:
        channel = member.process.channel
        try:
            for _ in range(MESSAGES_AT_ONCE):
                frame = channel.receive(0)
                if frame is None:
                    break
                self._judge.hear(member, frame.message(), time.monotonic())
            else:
                return
        except ChannelTimeout:
            return
        except (ChannelError, OSError) as error:
            member.broken = f"sent what rank 0 cannot read ({error})"
        self._selector.unregister(channel)
        self._judge.suspect(member, time.monotonic())

    def _find_fault(self, now: float) -> WorkerError | None:
        ended = [member for member in self.members if member.end is None and member.find_end()]
        if ended:
            self._read(0)  # what it said last
        for member in ended:
            self._judge.suspect(member, now)
        return self._judge.verdict(now)

    def _fail(self, verdict: WorkerError) -> None:
        self._kill()
        with self._changed:
            self.failure = verdict
            self._changed.notify_all()
        for member in self.members:
            member.process.channel.shut_down()
        try:
            if self._on_failure is not None:
                self._on_failure(verdict)
        except BaseException:  # the rest must still be put away
            logger.exception("what was to be done about a worker's failure failed itself")

    def _ask_to_stop(self) -> None:
        """Tells all to end and waits for it, as long as the stop allows."""
        for member in self.members:
            try:
                member.process.channel.send(Stop(), min(0.5, self._rest_s()))
            except OSError:  # gone, or not reading: it is killed
                continue
        while self._rest_s() > 0 and not all([member.find_end() for member in self.members]):
            self._read(BUSY_TICK_S)

    def _rest_s(self) -> float:
        return max(0.0, (self._stop_by or 0.0) - time.monotonic())

    def _kill(self) -> None:
        for member in self.members:
            member.process.kill()

    def _end(self) -> None:
        """Leaves no process, descriptor or reference behind."""
        self._on_failure = None
        deadline = time.monotonic() + REAP_TIMEOUT_S
        try:
            self._kill()
            for member in self.members:
                if not member.process.wait(max(0.0, deadline - time.monotonic())):
                    logger.warning("%s has not ended after SIGKILL: %s", member.name, member.process.state())
                member.process.channel.close()
            self._launcher.close()
        finally:
            self._selector.close()
            self._bell.close()
            with self._changed:
                self.ended = True
                self._changed.notify_all()
            atexit.unregister(self._stop_at_exit)
