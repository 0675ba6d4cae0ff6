"""LocalLauncher: workers as children of this process, each on one end of a socket pair."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from lamella_core.errors import WorkerError
from lamella_executor.worker.channel import Channel
from lamella_executor.worker.process import WorkerProcess, describe_exit

MODULE = "lamella_executor.worker"
WORDS_BYTES = 4096  # kept of a worker's output, for the message about its death
READS_AT_ONCE = 16  # of that size, so that a worker that writes without end does not keep its reader
_STATES = {
    "T": "it is stopped (SIGSTOP?)",
    "t": "it is stopped by a debugger",
    "D": "it waits uninterruptibly for a disk or a driver",
    "Z": "it has ended",
}


class LocalProcess:
    """A worker on this machine. Owns the process, its channel, and the reading end of the pipe it writes to."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], channel: Channel, output: int) -> None:
        self.rank = rank
        self.channel = channel
        self._process = process
        self._output: int | None = output  # non-blocking
        self._line = b""  # begun and not yet passed on
        self._words = b""
        self._lock = threading.Lock()  # around whatever ends or reaps

    def describe(self) -> str:
        return f"pid {self._process.pid}"

    def poll(self) -> str | None:
        """Returns how it ended, None while it lives."""
        with self._lock:
            if self._process.returncode is None and self._has_ended():
                self._kill_group()  # its number is its own until it is reaped
                self._process.wait()
            code = self._process.returncode
        return None if code is None else describe_exit(code)

    def state(self) -> str | None:
        return process_state(self._process.pid)

    def output_fileno(self) -> int | None:
        return self._output

    def forward_output(self) -> bool:
        """Passes whole lines on to this process's stderr, marked with the rank; returns whether more may come."""
        if self._output is None:
            return False
        for _ in range(READS_AT_ONCE):
            try:
                read = os.read(self._output, WORDS_BYTES)
            except BlockingIOError:
                return True
            if not read:
                return False
            self._words = (self._words + read)[-WORDS_BYTES:]
            *lines, self._line = (self._line + read).split(b"\n")
            for line in lines:
                self._forward(line[:WORDS_BYTES])
            self._line = self._line[-WORDS_BYTES:]
        return True

    def _forward(self, line: bytes) -> None:
        """Writes a line to stderr, unless that would wait: nobody may be reading it, and the watcher must go on."""
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        try:
            if any(events & select.POLLOUT for _, events in poll.poll(0)):
                os.write(2, f"[rank {self.rank}] ".encode() + line + b"\n")
        except OSError:  # closed
            return

    def last_words(self) -> str:
        self.forward_output()
        return self._words.decode(errors="replace").strip()

    def kill(self) -> None:
        """Kills it and its children."""
        with self._lock:
            if self._process.returncode is None:
                self._kill_group()

    def wait(self, timeout_s: float) -> bool:
        """Waits for its end, after which nothing of it is left here but its channel."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if self._output is not None:
            self.forward_output()
            if self._line:
                self._forward(self._line)
            os.close(self._output)
            self._output = None
        return True

    def _has_ended(self) -> bool:
        """Returns whether it can be reaped, without reaping it."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else reaped it (SIGCHLD is ignored, or a wait for any child)
            return True

    def _kill_group(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        except PermissionError:  # macOS: a group of the dead
            return


class LocalLauncher:
    """Starts workers on this machine, each the leader of its own session: a Ctrl-C at the terminal is not theirs."""

    def __init__(self, world_size: int) -> None:
        self.hosts = {rank: "127.0.0.1" for rank in range(world_size)}
        self.device_indices = {rank: rank for rank in range(world_size)}

    def launch(self, ranks: range, environment: Mapping[str, str]) -> list[WorkerProcess]:
        """Starts one process for each rank.

        Raises:
            WorkerError: one could not be started; none is left.
        """
        started: list[WorkerProcess] = []
        try:
            for rank in ranks:
                started.append(_start(rank, worker_environment(environment)))
        except BaseException as error:
            for process in started:
                process.kill()
                process.wait(1.0)
                process.channel.close()
            if isinstance(error, OSError):
                raise WorkerError(f"rank {rank} could not be started: {error}") from error
            raise
        return started

    def close(self) -> None:
        """Holds nothing."""


def process_state(pid: int) -> str | None:
    """Returns what is known about a process of this machine that lives but is silent, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # no /proc, or gone
        return None
    letter = text.rpartition(")")[2].split()[0]
    return _STATES.get(letter, f"its heartbeat thread does not run, though the process does (state {letter})")


def worker_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Returns a worker's environment: this one's, ``extra``, and a Python path that finds the same modules as here."""
    here = [path or os.getcwd() for path in sys.path]
    first = [extra["PYTHONPATH"]] if "PYTHONPATH" in extra else []
    # SAFEPATH: `python -m` would search the working directory first, where a file may be named like a module.
    return {**os.environ, **extra, "PYTHONPATH": os.pathsep.join(first + here), "PYTHONSAFEPATH": "1"}


def _start(rank: int, environment: Mapping[str, str]) -> LocalProcess:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    try:
        os.set_blocking(reading, False)
        # Descriptors of Python are not inherited unless named: no worker holds another's channel open.
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=writing,  # stdout belongs to the user's program
            stderr=writing,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env=dict(environment),
        )
    except BaseException:
        ours.close()
        os.close(reading)
        raise
    finally:
        theirs.close()
        os.close(writing)
    return LocalProcess(rank, process, Channel(ours), reading)
