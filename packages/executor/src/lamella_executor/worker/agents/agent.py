"""The agents of ranks 1 and up: they start workers when agent 0 says so, and report how those end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from lamella_executor.worker.agents import guard
from lamella_executor.worker.agents.exchange import POLL_S, Exchange
from lamella_executor.worker.agents.messages import (
    AgentMessage,
    Connect,
    Ended,
    Forget,
    Inspect,
    Inspected,
    Kill,
    Quit,
    Start,
    Started,
)
from lamella_executor.worker.agents.network import dial
from lamella_executor.worker.local import MODULE, process_state
from lamella_executor.worker.process import describe_exit

END_TIMEOUT_S = 2.0
_MPI_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDI_", "HYDRA_")

WorkerKey = tuple[int, int]  # session, rank


def child_environment(additions: dict[str, str]) -> dict[str, str]:
    """Returns this process's environment without its identity as an MPI process, and with ``additions``.

    A child is no MPI process: one that took up its agent's identity would disturb the job.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_MPI_PREFIXES) or "ALLOW_RUN_AS_ROOT" in name
    }
    return {**kept, **additions}


def guarded(command: list[str]) -> list[str]:
    """Returns the command that runs ``command`` and is killed when this process ends."""
    return [sys.executable, "-I", "-S", str(Path(guard.__file__)), str(os.getpid()), *command]


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Returns whether ``process`` has ended; it is not reaped, so that its number stays its group's."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def signal_group(leader: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to the process group of ``leader``, which must not have been reaped."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, number)


class Agent:
    """Starts, watches and ends the workers of one rank: one per session that the command has open."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._connections: dict[WorkerKey, Future[socket.socket]] = {}  # owned until a worker inherits them
        self._starts: dict[WorkerKey, Start] = {}
        self._workers: dict[WorkerKey, subprocess.Popen[bytes]] = {}

    def run(self) -> int:
        """Serves until the command has ended; returns its exit code."""
        code = None
        while code is None:
            for message in self._exchange.receive():
                if isinstance(message, Quit):
                    code = message.code
                else:
                    self._obey(message)
            self._start_connected()
            self._report_ended()
            self._exchange.progress()
            time.sleep(POLL_S)
        self._end_all()
        return code

    def _obey(self, order: AgentMessage) -> None:
        if isinstance(order, Connect):
            self._connections[order.session, order.rank] = _dial_in_background(order)
        elif isinstance(order, Start):
            self._starts[order.session, order.rank] = order
        elif isinstance(order, Kill):
            self._kill((order.session, order.rank))
        elif isinstance(order, Forget):
            self._forget(order.session)
        elif isinstance(order, Inspect):
            key = (order.session, order.rank)
            state = process_state(self._workers[key].pid) if key in self._workers else None
            self._report(Inspected(*key, state))

    def _start_connected(self) -> None:
        """Starts each worker that was ordered and whose connection to rank 0 stands."""
        for key, connecting in list(self._connections.items()):
            if not connecting.done():
                continue
            failure = connecting.exception()
            if failure is not None:
                del self._connections[key]
                self._report(Ended(*key, f"did not start: {failure}"))
            elif key in self._starts:
                with self._connections.pop(key).result() as connection:
                    self._workers[key] = _spawn(self._starts.pop(key), connection)
                self._report(Started(*key, self._workers[key].pid))

    def _report_ended(self) -> None:
        for key, worker in list(self._workers.items()):
            if has_ended(worker):
                self._kill(key)  # its children
                del self._workers[key]
                self._report(Ended(*key, describe_exit(worker.wait())))

    def _report(self, message: AgentMessage) -> None:
        self._exchange.send(message, 0)

    def _kill(self, key: WorkerKey) -> None:
        worker = self._workers.get(key)
        if worker is not None:
            signal_group(worker, signal.SIGKILL)

    def _forget(self, session: int) -> None:
        for key in [key for key in self._connections if key[0] == session]:
            self._starts.pop(key, None)
            self._connections.pop(key).add_done_callback(_close_result)
        for key in [key for key in self._workers if key[0] == session]:
            self._kill(key)

    def _end_all(self) -> None:
        for session in {session for session, _ in (*self._connections, *self._workers)}:
            self._forget(session)
        deadline = time.monotonic() + END_TIMEOUT_S
        for worker in self._workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, deadline - time.monotonic()))


def _spawn(order: Start, connection: socket.socket) -> subprocess.Popen[bytes]:
    """Starts a worker that inherits ``connection``, in a session of its own: the job's signals are not meant for it."""
    descriptor = connection.fileno()
    return subprocess.Popen(
        guarded([sys.executable, "-m", MODULE, str(descriptor), str(os.getpid())]),
        env=child_environment(order.environment),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),  # stdout belongs to the user's program
        pass_fds=[descriptor],
        start_new_session=True,
    )


def _dial_in_background(order: Connect) -> Future[socket.socket]:
    """Connects from a thread that does not hold up the end of this process."""
    future: Future[socket.socket] = Future()

    def work() -> None:
        try:
            future.set_result(dial(order.endpoints, order.token, order.rank))
        except OSError as error:
            future.set_exception(error)

    threading.Thread(target=work, name="lamella-dial", daemon=True).start()
    return future


def _close_result(future: Future[socket.socket]) -> None:
    if future.exception() is None:
        future.result().close()
