"""What every worker does, whatever it serves: says hello, sends heartbeats, reports its failure, ends with rank 0."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from lamella_core import __version__
from lamella_core.errors import ConfigError
from lamella_executor.worker.channel import Channel, ChannelError
from lamella_executor.worker.messages import Failed, Heartbeat, Hello, Log, Setup, Stop

HEARTBEAT_S = 0.5
LINGER_S = 10.0  # after a failure, for rank 0 to take note of it and kill this process
TRACEBACK_CHARS = 8000


@dataclass
class WorkerState:
    """What a worker is at; written by the serving thread, told to rank 0 by the heartbeat thread."""

    phase: str = "launch"  # "load", "start", "prefill", "decode"
    step: int = 0  # steps done
    heartbeat_s: float = 0.1  # between two of them; until the Setup says how often


def run_worker(channel: Channel, parent_pid: int) -> int:
    """Serves rank 0 until it says Stop or is gone; returns the exit code of the process.

    Nothing heavy is imported before rank 0 has been greeted.
    """
    state = WorkerState()
    channel.send(Hello(os.getpid(), __version__))
    _start_heartbeat(channel, state, parent_pid)
    try:
        frame = channel.receive()
        setup = Stop() if frame is None else frame.message()
        if isinstance(setup, Stop):
            return 0
        if not isinstance(setup, Setup):
            raise ChannelError(f"a {type(setup).__name__} came before the Setup")
        state.heartbeat_s = min(HEARTBEAT_S, setup.worker_timeout_s / 4)
        _forward_logging(channel, setup.log_level)
        _find(setup.serve)(channel, setup, state)
    except BaseException as error:  # noqa: BLE001 - whatever ends a worker, rank 0 must hear why
        _report(channel, state, error)
        return 1
    finally:
        if channel.wait_hangup(0):
            _die()
    return 0


def _find(target: str) -> Callable[[Channel, Setup, WorkerState], None]:
    """Returns a serve function.

    What it needs is imported without the garbage collector, and kept from it for good: it all stays, and there is so
    much of it (PyTorch) that looking through it takes a third of the start and most of a later collection.
    """
    module, _, name = target.partition(":")
    gc.disable()
    function = getattr(importlib.import_module(module), name, None)
    gc.freeze()
    gc.enable()
    if not callable(function):
        raise ConfigError(f"Setup.serve is {target!r}; it must be 'module:function'")
    return function


def _report(channel: Channel, state: WorkerState, error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))[-TRACEBACK_CHARS:]
    try:
        channel.send(Failed(state.phase, type(error).__name__, str(error), text), timeout_s=LINGER_S)
    except OSError:  # rank 0 is gone, or no longer reads
        return
    # Over TCP, an end with steps unread would take back what was just sent.
    channel.wait_hangup(LINGER_S)


def _start_heartbeat(channel: Channel, state: WorkerState, parent_pid: int) -> None:
    serving = threading.get_ident()

    def beat() -> None:
        while not channel.wait_hangup(state.heartbeat_s) and os.getppid() == parent_pid:
            try:
                channel.send(Heartbeat(state.phase, state.step, _find_place(serving)))
            except OSError:
                break
        _die()

    threading.Thread(target=beat, name="lamella-heartbeat", daemon=True).start()


def _die() -> None:
    """Ends this process and its children at once: rank 0 is gone, and the serving thread may wait for it for ever."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _find_place(thread: int) -> str:
    """Returns the innermost place in Lamella's own code where a thread is."""
    frame = innermost = sys._current_frames().get(thread)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("lamella"):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _forward_logging(channel: Channel, level: int) -> None:
    """Sends this process's log records to rank 0, where the user's configuration of logging applies."""

    class ToRankZero(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                channel.send(Log(record.levelno, self.format(record)))
            except OSError:
                self.handleError(record)

    handler = ToRankZero()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level)
