"""Serve functions for workers of tests: each a small part of what a real worker does, imported by name there."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

from lamella_executor.worker.channel import STEP, Channel
from lamella_executor.worker.entry import WorkerState
from lamella_executor.worker.messages import Load, Ready, Setup, Start, Stop


def serve(channel: Channel, setup: Setup, state: WorkerState) -> None:
    """Answers Load and Start with Ready, counts steps, and does what the JSON in Load or a step tells this rank to do.

    The JSON is an object: rank -> [name of a deed, its arguments].
    """
    while (frame := channel.receive()) is not None:
        if frame.kind == STEP:
            state.phase = "decode"
            _do(channel, setup, frame.payload)
            state.step += 1
            channel.send(Ready(f"step {state.step}"))
            continue
        message = frame.message()
        if isinstance(message, Stop):
            return
        if isinstance(message, Load):
            state.phase = "load"
            _do(channel, setup, message.arguments)
        elif isinstance(message, Start):
            state.phase = "start"
            _do(channel, setup, message.options)
        channel.send(Ready(state.phase))


def show_setup(channel: Channel, setup: Setup, state: WorkerState) -> None:
    """Logs who it was told to be, then waits for the end."""
    text = "rank %d of %d has device %d, mapping %s"
    logging.getLogger("tests").warning(text, setup.rank, setup.world_size, setup.device_index, setup.mapping)
    channel.receive()


def _do(channel: Channel, setup: Setup, orders: bytes) -> None:
    deed, *arguments = json.loads(orders or b"{}").get(str(setup.rank), ["nothing"])
    if deed == "babble":
        os.write(channel.fileno(), b"\xff" * 100)
        time.sleep(1000)
    DEEDS[deed](*arguments)


def leave(channel: Channel, setup: Setup, state: WorkerState) -> None:
    """Ends at once."""


def _signal(number: int, after_s: float = 0.0) -> None:
    time.sleep(after_s)
    os.kill(os.getpid(), number)


def _spin() -> None:
    while True:
        pass


def _abort(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    os.abort()


def _fail(text: str, after_s: float = 0.0) -> None:
    time.sleep(after_s)
    raise ValueError(text)


def _have_a_child() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    logging.getLogger("tests").warning("child %d", child.pid)


def _write(descriptor: int, text: str, times: int = 1) -> None:
    for _ in range(times):
        os.write(descriptor, text.encode())


def _log(level: int, text: str, times: int = 1) -> None:
    for _ in range(times):
        logging.getLogger("tests").log(level, text)


DEEDS = {
    "nothing": lambda: None,
    "signal": _signal,
    "sleep": time.sleep,
    "spin": _spin,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(1000),
    "exit": os._exit,
    "abort": _abort,
    "fail": _fail,
    "have a child": _have_a_child,
    "log": _log,
    "write": _write,
    "show": lambda: logging.getLogger("tests").warning("modules %s", sorted(sys.modules)),
}
