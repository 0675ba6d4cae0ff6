"""Watch: the thread of rank 0 that reads what workers say and notices when one dies, fails, falls silent or hangs."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from lamella_core.errors import WorkerError
from lamella_executor.worker.channel import ChannelError, ChannelTimeout
from lamella_executor.worker.member import Member, describe_death, describe_silence, describe_stall, find_culprit
from lamella_executor.worker.messages import Failed, Heartbeat, Hello, Log, Ready, Stop
from lamella_executor.worker.process import Launcher, WorkerProcess

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0  # until a worker's first word: a Python interpreter starts, perhaps from a slow network disk
SETTLE_S = 0.3  # from the first sign of a failure to the verdict: what one death causes elsewhere must not hide it
SETTLE_UNKNOWN_S = 1.5  # the same while it is not known how a process ended
REAP_TIMEOUT_S = 3.0  # from SIGKILL until a process has ended; a driver may hold it
EXIT_TIMEOUT_S = 3.0  # for everything, when the interpreter ends
TICK_S = 0.25
BUSY_TICK_S = 0.02  # while an end is awaited
_numbers = itertools.count(1)  # for thread names only


class Watch:
    """Owns the thread, the workers' processes, the receiving side of their channels, and the launcher.

    Holds nothing that leads back to the crew, so that dropping the crew can end it. After a failure or a stop it kills
    what is left, reaps and closes everything, and ends.

    Attributes:
        phase: what the engine is at, for messages; set by any thread.
        failure: what ended the watch, if something failed; set once.
    """

    def __init__(
        self,
        launcher: Launcher,
        processes: Sequence[WorkerProcess],
        *,
        timeout_s: float,
        stall_timeout_s: float,
        on_failure: Callable[[WorkerError], None],
    ) -> None:
        now = time.monotonic()
        self.phase = "launch"
        self.failure: WorkerError | None = None
        self.ended = False
        self.members = [Member(process, heard_s=now, moved_s=now) for process in processes]
        self._launcher = launcher
        self._timeout_s = timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._on_failure: Callable[[WorkerError], None] | None = on_failure
        self._expected: tuple[int, float] | None = None  # step that rank 0 waits for, since when
        self._verdict: WorkerError | None = None  # passed by another thread
        self._stop_by: float | None = None
        self._owner_pid = os.getpid()
        self._changed = threading.Condition()
        bell, rope = socket.socketpair()
        self._bell = bell
        self._rope = [rope]  # who takes it out rings, once
        self._selector = selectors.DefaultSelector()
        self._selector.register(bell, selectors.EVENT_READ)
        for member in self.members:
            self._selector.register(member.process.channel, selectors.EVENT_READ, member)
            output = member.process.output_fileno()
            if output is not None:
                self._selector.register(output, selectors.EVENT_READ, member.process)
        self._thread = threading.Thread(target=self._run, name=f"lamella-watch-{next(_numbers)}", daemon=True)
        atexit.register(self.stop, EXIT_TIMEOUT_S)
        self._thread.start()

    # ---- for other threads

    @property
    def is_stopping(self) -> bool:
        return self._stop_by is not None or self.ended

    def expect(self, step: int | None) -> None:
        """Says which step rank 0 waits for all workers to have done, from now on; None when it waits for none."""
        self._expected = None if step is None else (step, time.monotonic())

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until ``condition`` holds, the watch has failed or ended; returns whether one is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self.failure is not None or self.ended or condition(), timeout_s)

    def condemn(self, error: WorkerError) -> None:
        """Ends everything for a reason that another thread found; returns when `failure` is set."""
        self._verdict = error
        self._ring()
        self.wait_until(lambda: False, SETTLE_UNKNOWN_S)

    def request_stop(self, grace_s: float) -> None:
        """Tells the workers to end within ``grace_s``, then kills them; does not wait. Safe in a garbage collection."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the user's process: the workers are not its own
        stop_by = time.monotonic() + grace_s
        self._stop_by = stop_by if self._stop_by is None else min(self._stop_by, stop_by)
        self._ring()

    def stop(self, timeout_s: float) -> bool:
        """Stops and waits; returns whether nothing is left after ``timeout_s``. Idempotent."""
        self.request_stop(max(timeout_s / 2, timeout_s - 1.0))
        if os.getpid() != self._owner_pid or threading.current_thread() is self._thread:
            return False
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("workers have not ended %.1f s after they were stopped", timeout_s)
        return not self._thread.is_alive()

    def _ring(self) -> None:
        """Wakes the thread, for good; takes no lock."""
        try:
            rope = self._rope.pop()
        except IndexError:
            return
        with contextlib.suppress(OSError):
            rope.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold a copy, so closing is not enough
        rope.close()

    # ---- the thread

    def _run(self) -> None:
        try:
            try:
                verdict = self._watch()
            except BaseException as error:  # workers that nobody watches must not live on
                logger.exception("the watcher failed")
                verdict = WorkerError(f"watching the workers failed: {type(error).__name__}: {error}")
            if verdict is not None:
                self._fail(verdict)
            else:
                self._ask_to_stop()
        finally:
            self._end()

    def _watch(self) -> WorkerError | None:
        """Reads and judges until something fails (returned) or a stop is asked for (None)."""
        tick_s = min(TICK_S, self._timeout_s / 4)
        last = time.monotonic()
        while self._stop_by is None:
            self._read(BUSY_TICK_S if any(member.symptom_s for member in self.members) else tick_s)
            now = time.monotonic()
            if now - last > 2 * tick_s:  # this process itself was stopped, or short of a core: nobody's silence
                for member in self.members:
                    member.heard_s += now - last
                    member.moved_s += now - last
            last = now
            verdict = self._verdict or self._judge(now)
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
            while True:
                frame = channel.receive(0)
                if frame is None:
                    break
                self._note(member, frame.message())
        except ChannelTimeout:
            return
        except (ChannelError, OSError) as error:
            member.broken = str(error)
        self._selector.unregister(channel)
        member.see_symptom(self.phase)

    def _note(self, member: Member, message: object) -> None:
        now = time.monotonic()
        member.heard_s = now
        if isinstance(message, Heartbeat):
            if message.step != member.step:
                member.moved_s = now
            member.phase, member.step, member.place = message.phase, message.step, message.place
        elif isinstance(message, Hello):
            member.greet(message)
        elif isinstance(message, Ready):
            member.ready.append(message.phase)
        elif isinstance(message, Failed):
            member.failed = message
            member.see_symptom(message.phase)
        elif isinstance(message, Log):
            logging.getLogger(f"{__package__}.rank{member.rank}").log(message.level, "%s", message.text)
        else:
            raise ChannelError(f"a {type(message).__name__} came, which no worker sends")

    def _judge(self, now: float) -> WorkerError | None:
        ended = [member for member in self.members if member.end is None and member.find_end()]
        if ended:
            self._read(0)  # what it said last
        for member in ended:
            member.see_symptom(self.phase)
        struck = [member for member in self.members if member.symptom_s is not None]
        if struck:
            is_clear = all(member.failed or member.end for member in struck)
            settle_s = SETTLE_S if is_clear else SETTLE_UNKNOWN_S
            if len(struck) < len(self.members) or not is_clear:
                if now < min(member.symptom_s or now for member in struck) + settle_s:
                    return None
            return describe_death(find_culprit(struck), struck)
        for member in self.members:
            limit_s = self._timeout_s if member.greeted else max(self._timeout_s, START_TIMEOUT_S)
            if now - member.heard_s > limit_s:
                return describe_silence(member, self.phase, now - member.heard_s, limit_s)
        return self._judge_progress(now)

    def _judge_progress(self, now: float) -> WorkerError | None:
        expected = self._expected
        if expected is None:
            return None
        step, since = expected
        behind = [member for member in self.members if member.step < step]
        late = [m for m in behind if now - max(m.moved_s, since) > self._stall_timeout_s]
        if not late or len(late) < len(behind):  # who still moves is waited for
            return None
        last = min(member.step for member in late)
        return describe_stall([m for m in late if m.step == last], step, self._stall_timeout_s, self.phase)

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
        self._kill()
        deadline = time.monotonic() + REAP_TIMEOUT_S
        for member in self.members:
            if not member.process.wait(max(0.0, deadline - time.monotonic())):
                logger.warning("%s has not ended after SIGKILL: %s", member.name, member.process.state())
            member.process.channel.close()
        self._selector.close()
        self._ring()
        self._bell.close()
        self._launcher.close()
        with self._changed:
            self.ended = True
            self._changed.notify_all()
        atexit.unregister(self.stop)
