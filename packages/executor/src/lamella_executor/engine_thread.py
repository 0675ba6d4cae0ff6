"""EngineThread: runs an engine loop on one background thread, from its start to its bounded end."""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from lamella_executor.exit import wait_at_exit
from lamella_executor.failures import detach
from lamella_executor.mailbox import Abort, Command, Mailbox

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 4.0  # how long a stop waits for the step that runs
ABANDON_S = 3.0  # after a rank's failure, how long users wait for the step that runs
_GIVE_WAY_S = 2e-4  # a thread that computes keeps Python's interpreter for 25 times as long before another one's turn
_numbers = itertools.count(1)  # for thread names only


class Loop(Protocol):
    """What the thread drives; `lamella_executor.loop.EngineLoop`."""

    @property
    def has_work(self) -> bool: ...

    @property
    def needs_host(self) -> bool:
        """Whether its thread prepares what a device will compute, which may have nothing else to do meanwhile."""
        ...

    def submit(self, command: Any) -> None: ...

    def abort(self, request_id: int) -> None: ...

    def step(self) -> None: ...

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """Ends every request the loop holds."""
        ...

    def abandon(self, make_error: Callable[[], Exception]) -> None:
        """Ends every request on another thread, while the loop's own hangs in a step; changes nothing else."""
        ...


class EngineThread:
    """Owns the thread. Holds nothing that leads back to the executor, so dropping the executor can end it.

    An exception that leaves ``loop.step`` is fatal: the mailbox is closed with it as cause and every request the engine
    holds, or was sent, fails with EngineDeadError.
    """

    def __init__(self, loop: Loop, mailbox: Mailbox, close: Callable[[], None] | None = None) -> None:
        """Starts it.

        Args:
            loop: driven by the thread alone.
            mailbox: where its commands come from.
            close: gives back what the loop's parts hold beside host memory; called by the thread at its end.
        """
        self._mailbox = mailbox
        self._close = close
        self._loop: Loop | None = loop  # until the thread ends
        self._has_ended = threading.Event()  # but for the end of its own frames
        self._thread = threading.Thread(
            target=_run, args=(loop, mailbox, self._ended), name=f"lamella-engine-{next(_numbers)}", daemon=True
        )
        # The interpreter must not tear down under a running kernel, nor while the thread lets go of the loop's tensors
        # at its very end: so the thread does not take this back itself, who has joined it does.
        atexit.register(self._stop_at_exit)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def give_way(self) -> None:
        """Lets the loop go first where it needs the host; called by threads that submit many requests.

        They would hold the interpreter whenever a launch lets go of it, some hundred times a step.
        """
        loop = self._loop
        if loop is not None and loop.needs_host:
            time.sleep(_GIVE_WAY_S)

    def request_stop(self) -> None:
        """Tells the loop to end after the step that runs; does not wait. Safe inside a garbage collection."""
        self._mailbox.close()

    def die(self, cause: BaseException) -> None:
        """Ends the engine for a cause that another thread has found; does not wait.

        If the loop does not come back from its step within `ABANDON_S`, its requests fail nevertheless.
        """
        self._mailbox.close(cause)
        threading.Thread(target=self._bury, name=f"{self._thread.name}-end", daemon=True).start()

    def _bury(self) -> None:
        self._thread.join(ABANDON_S)
        loop = self._loop
        if loop is None or not self._thread.is_alive():
            return
        logger.error("the engine thread hangs in its step %.1f s after the engine's end; its requests fail", ABANDON_S)
        loop.abandon(self._mailbox.dead_error)
        _fail_commands(self._mailbox.take_rest(), self._mailbox)

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> bool:
        """Ends the loop and waits for it; returns whether the thread ended within ``timeout`` seconds. Idempotent."""
        self.request_stop()
        if threading.current_thread() is self._thread:  # a logits processor or decoder shuts down; the step goes on
            return False
        # A Ctrl-C in Thread.join(timeout) would make Python (3.11 and before) take a running thread for an ended one.
        if self._thread.is_alive() and not self._has_ended.wait(timeout):
            logger.warning("the engine thread has not ended within %.1f s; a step is still running", timeout)
            return False
        self._thread.join()
        atexit.unregister(self._stop_at_exit)
        return True

    def _stop_at_exit(self) -> None:
        wait_at_exit(self.stop, STOP_TIMEOUT_S)

    def _ended(self) -> None:
        close, self._close, self._loop = self._close, None, None
        try:
            if close is not None:
                close()
        finally:
            self._has_ended.set()


def _run(loop: Loop, mailbox: Mailbox, ended: Callable[[], None]) -> None:
    taken: deque[Command] = deque()  # not yet applied
    try:
        cause = _drive(loop, mailbox, taken)
        if cause is not None:
            logger.error("the engine loop failed; the executor is dead\n%s", detach(cause))
        mailbox.close(cause)
        loop.fail_all(mailbox.dead_error)
    finally:
        mailbox.close(RuntimeError("the engine thread ended unexpectedly"))
        try:
            _fail_commands((*taken, *mailbox.take_rest()), mailbox)
        finally:
            ended()


def _fail_commands(commands: Iterable[Command], mailbox: Mailbox) -> None:
    for command in commands:
        if not isinstance(command, Abort) and not command.done:
            command.fail(mailbox.dead_error())


def _drive(loop: Loop, mailbox: Mailbox, taken: deque[Command]) -> BaseException | None:
    """Steps until the mailbox is closed; returns the error that broke the loop, if one did."""
    try:
        while True:
            commands = mailbox.take(wait=not loop.has_work)
            if commands is None:
                return None
            taken.extend(commands)
            while taken:
                _apply(loop, taken[0])
                taken.popleft()
            if loop.has_work:
                loop.step()
    except BaseException as error:  # noqa: BLE001 - whatever broke the loop, every waiter must hear of it
        return error


def _apply(loop: Loop, command: Command) -> None:
    if isinstance(command, Abort):
        loop.abort(command.request_id)
    else:
        loop.submit(command)
