"""Mailbox: the only way from users' threads to the engine loop's thread."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamella_core.errors import EngineDeadError
from lamella_executor.request import RequestStatus, RequestUpdate

if TYPE_CHECKING:
    from lamella_executor.result import GenerationResult
    from lamella_executor.sequence import RequestState


@dataclass(frozen=True, slots=True)
class Submit:
    """A validated request and the result that its user holds."""

    request: RequestState
    result: GenerationResult

    def fail(self, error: Exception) -> None:
        """Ends the request before the loop has seen it."""
        self.result.publish(RequestUpdate(RequestStatus.FAILED, error=error))


@dataclass(frozen=True, slots=True)
class Abort:
    """Cancel a request; unknown or finished ids are ignored."""

    request_id: int


Command = Submit | Abort


class Mailbox:
    """Commands for the loop, in order. The lock is re-entrant: a garbage collector run may close it at any point."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._commands: deque[Command] = deque()
        self._closed = False
        self._cause: BaseException | None = None

    @property
    def is_closed(self) -> bool:
        return self._closed

    def put(self, command: Command) -> None:
        """Appends a command and wakes the loop.

        Raises:
            EngineDeadError: the engine was shut down, or died of the error in ``__cause__``.
        """
        with self._arrived:
            if self._closed:
                raise self.dead_error()
            self._commands.append(command)
            self._arrived.notify()

    def take(self, wait: bool) -> list[Command] | None:
        """Returns all commands; None once closed. With ``wait`` it sleeps until there are some or it is closed."""
        if not wait and not self._commands and not self._closed:
            return []
        with self._arrived:
            while wait and not self._commands and not self._closed:
                self._arrived.wait()
            if self._closed:
                return None
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def close(self, cause: BaseException | None = None) -> None:
        """Refuses further commands and makes the loop stop; ``cause`` is given if the engine died."""
        with self._arrived:
            if not self._closed:
                self._closed, self._cause = True, cause
            self._arrived.notify_all()

    def take_rest(self) -> list[Command]:
        """Returns what was put but never taken; call after `close`."""
        with self._arrived:
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def dead_error(self) -> EngineDeadError:
        """Returns a new error that says how the engine ended."""
        if self._cause is None:
            return EngineDeadError("the executor was shut down; create a new one to go on")
        error = EngineDeadError(f"the engine stopped after {type(self._cause).__name__}: {self._cause}")
        error.__cause__ = self._cause
        return error
