"""Work that can be given up from outside: a start that takes minutes, when another rank has failed after seconds."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_POLL_S = 0.05
_UNWIND_S = 1.0  # for work that was given up; one that computes on outside of Python is left behind

T = TypeVar("T")


class _GivenUp(BaseException):
    """Raised in the thread of work that nobody waits for any more."""


class _Work(Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self.done = threading.Event()
        self.results: list[T] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="lamella-start", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.results.append(self._function())
        except _GivenUp:
            self.results.clear()
        except BaseException as error:  # noqa: BLE001 - raised where the result is waited for
            self.error = error
        finally:
            self.done.set()

    def give_up(self) -> None:
        """Raises `_GivenUp` in the thread, between two steps of its Python code."""
        ident = self.thread.ident
        if ident is not None and not self.done.is_set():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_GivenUp))
            self.done.wait(_UNWIND_S)


def run_interruptibly(function: Callable[[], T], check: Callable[[], None]) -> T:
    """Returns what ``function`` returns, called on a thread of its own.

    Args:
        function: whatever it raises is raised here.
        check: called again and again meanwhile; when it raises, as when Ctrl-C is pressed, the work is given up.
    """
    work = _Work(function)
    try:
        while not work.done.wait(_POLL_S):
            check()
    except BaseException:
        work.give_up()
        raise
    error, work.error = work.error, None  # its traceback leads back here
    if error is not None:
        raise error
    return work.results[0]
