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
            _do(setup, frame.payload)
            state.step += 1
            channel.send(Ready(f"step {state.step}"))
            continue
        message = frame.message()
        if isinstance(message, Stop):
            return
        if isinstance(message, Load):
            state.phase = "load"
            _do(setup, message.arguments)
        elif isinstance(message, Start):
            state.phase = "start"
            _do(setup, message.options)
        channel.send(Ready(state.phase))


def _do(setup: Setup, orders: bytes) -> None:
    deed, *arguments = json.loads(orders or b"{}").get(str(setup.rank), ["nothing"])
    DEEDS[deed](*arguments)


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


DEEDS = {
    "nothing": lambda: None,
    "signal": lambda number: os.kill(os.getpid(), number),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(1000),
    "exit": os._exit,
    "abort": _abort,
    "fail": _fail,
    "have a child": _have_a_child,
    "log": lambda level, text: logging.getLogger("tests").log(level, text),
    "write": lambda descriptor, text: os.write(descriptor, text.encode()),
    "show": lambda: logging.getLogger("tests").warning("modules %s", sorted(sys.modules)),
}
