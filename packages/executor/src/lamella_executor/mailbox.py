"""Mailbox: the only way from users' threads to the engine loop's thread."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamella_core.errors import EngineDeadError
from lamella_executor.request import RequestStatus, RequestUpdate

if TYPE_CHECKING:
    from lamella_executor.result import GenerationResult
    from lamella_executor.sequence import RequestState


@dataclass(frozen=True, slots=True, eq=False)
class Submit:
    """A validated request and the result that its user holds."""

    request: RequestState
    result: GenerationResult

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self.result.done

    def fail(self, error: Exception) -> None:
        """Ends the request before the loop has seen it."""
        self.result.publish(RequestUpdate(RequestStatus.FAILED, error=error))


@dataclass(frozen=True, slots=True, eq=False)
class Abort:
    """Cancel a request; unknown or finished ids are ignored."""

    request_id: int


Command = Any  # a request, with ``done`` and ``fail`` as `Submit` has them, or an `Abort`


class Mailbox:
    """A closable queue with one consumer. Closed for good by a shutdown, or by the error that killed the engine.

    It has no lock that could stay held: whatever a producer is doing when Ctrl-C, a garbage collection or a fork comes
    in between, the loop goes on and the queue can be closed. Operations of deque and Lock are atomic; that is all that
    is relied on.
    """

    def __init__(self) -> None:
        self._commands: deque[Command] = deque()
        self._wake = threading.Lock()  # held: nothing has arrived since the consumer last looked
        self._wake.acquire()
        self._is_closed = False
        self._cause: BaseException | None = None
        self._pid = os.getpid()
        self._consumer: int | None = None  # thread id

    @property
    def is_closed(self) -> bool:
        """Whether commands are refused; always so in a forked child, where no loop runs."""
        return self._is_closed or os.getpid() != self._pid

    def put(self, command: Command) -> None:
        """Appends a command and wakes the loop.

        Raises:
            EngineDeadError: the engine was shut down, or died of the error in ``__cause__``.
        """
        if self.is_closed:
            raise self.dead_error()
        self._commands.append(command)
        if self._is_closed:  # meanwhile: either the loop still finds the command and fails it, or it is taken back
            try:
                self._commands.remove(command)
            except ValueError:
                return
            raise self.dead_error()
        self._notify()

    def abort(self, request_id: int) -> None:
        """Sends an `Abort`; does nothing once closed, when every request fails anyway."""
        if not self.is_closed:
            self._commands.append(Abort(request_id))
            self._notify()

    def take(self, wait: bool) -> list[Command] | None:
        """Returns all commands; None once closed. With ``wait`` it sleeps until there are some or it is closed.

        Only the loop's thread calls it.
        """
        if wait:
            self._consumer = threading.get_ident()
            while not self._commands and not self._is_closed:
                self._wake.acquire()
        return None if self._is_closed else self.take_rest()

    def close(self, cause: BaseException | None = None) -> None:
        """Refuses further commands and makes the loop stop; ``cause`` is given if the engine died."""
        if not self._is_closed:
            self._cause, self._is_closed = cause, True
        self._notify()

    def take_rest(self) -> list[Command]:
        """Returns what was put and not taken yet."""
        commands: list[Command] = []
        while self._commands:
            try:
                commands.append(self._commands.popleft())
            except IndexError:  # its producer took it back
                break
        return commands

    def check_wait(self) -> None:
        """Refuses to wait for what can never come.

        Raises:
            EngineDeadError: this process was forked from the engine's.
            RuntimeError: this is the engine's own thread (a logits processor or decoder waits for a request).
        """
        if os.getpid() != self._pid:
            raise self.dead_error()
        if threading.get_ident() == self._consumer:
            raise RuntimeError("a logits processor or decoder waits for a request; its engine would wait for ever")

    def dead_error(self) -> EngineDeadError:
        """Returns a new error that says how the engine ended."""
        if os.getpid() != self._pid:
            return EngineDeadError(
                f"the engine runs in process {self._pid} and a fork has no engine; create an executor in this process"
            )
        if self._cause is None:
            return EngineDeadError("the executor was shut down; create a new one to go on")
        error = EngineDeadError(f"the engine stopped after {type(self._cause).__name__}: {self._cause}")
        error.__cause__ = self._cause
        return error

    def _notify(self) -> None:
        try:
            self._wake.release()
        except RuntimeError:  # the loop has not yet looked since the last time
            return
