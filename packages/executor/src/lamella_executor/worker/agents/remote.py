"""A launcher's connection to agent 0, and the workers as they are seen over it."""

from __future__ import annotations

import os
import threading
import time

import msgspec

from lamella_core.errors import ConfigError
from lamella_executor.worker.agents.messages import (
    Ended,
    Inspect,
    Inspected,
    Job,
    Kill,
    Node,
    Order,
    Started,
    receive,
    send,
)
from lamella_executor.worker.agents.network import dial
from lamella_executor.worker.channel import Channel
from lamella_executor.worker.launchers import AGENT_VARIABLE

GREETING_TIMEOUT_S = 10.0
INSPECT_TIMEOUT_S = 1.0
POLL_S = 0.05
AGENT_LOST = "lost its agent (lamella-launch has ended)"


class AgentLine:
    """The connection to agent 0, and what it has reported. For any thread."""

    def __init__(self, address: str) -> None:
        host, port, token = address.rsplit(":", 2)
        try:
            self._channel = Channel(dial([(host, int(port))], bytes.fromhex(token), os.getpid()))
            greeting = receive(self._channel, GREETING_TIMEOUT_S)
        except (OSError, EOFError, ValueError) as error:
            raise ConfigError(
                f"{AGENT_VARIABLE} names no agent that answers ({error}): the lamella-launch that set it has ended; "
                "remedy: start the command with mpirun -n N lamella-launch"
            ) from error
        self.nodes: list[Node] = greeting.nodes if isinstance(greeting, Job) else []
        self._lock = threading.Lock()
        self._lost = False
        self._pids: dict[int, int] = {}
        self._ended: dict[int, str] = {}
        self._states: dict[int, str | None] = {}

    def order(self, order: Order) -> None:
        """Sends an order; if agent 0 is gone, `ended` says so of every worker."""
        if self._lost:
            return
        try:
            send(self._channel, order)
        except OSError:
            self._lost = True

    def take_reports(self, timeout_s: float) -> None:
        """Reads what has been reported, waiting up to ``timeout_s`` for a first report."""
        with self._lock:
            if self._lost:
                return
            try:
                while (report := receive(self._channel, timeout_s)) is not None:
                    timeout_s = 0.0
                    if isinstance(report, Started):
                        self._pids[report.rank] = report.pid
                    elif isinstance(report, Ended):
                        self._ended[report.rank] = report.how
                    elif isinstance(report, Inspected):
                        self._states[report.rank] = report.state
            except (OSError, EOFError, msgspec.DecodeError):
                self._lost = True

    def pid(self, rank: int) -> int | None:
        return self._pids.get(rank)

    def ended(self, rank: int) -> str | None:
        """Returns how the worker of ``rank`` ended, None if it has not, as far as is known."""
        return self._ended.get(rank) or (AGENT_LOST if self._lost else None)

    def inspect(self, rank: int) -> str | None:
        """Asks the agent of ``rank`` for the state of its worker; None if it does not answer soon."""
        self._states.pop(rank, None)
        self.order(Inspect(0, rank))
        deadline = time.monotonic() + INSPECT_TIMEOUT_S
        while rank not in self._states and time.monotonic() < deadline and self.ended(rank) is None:
            self.take_reports(POLL_S)
        return self._states.get(rank)

    def close(self) -> None:
        self._lost = True
        self._channel.close()


class RemoteWorker:
    """A worker that an agent started; see `WorkerProcess`."""

    def __init__(self, node: Node, channel: Channel, line: AgentLine) -> None:
        self._node = node
        self._channel = channel
        self._line = line

    @property
    def rank(self) -> int:
        return self._node.rank

    @property
    def channel(self) -> Channel:
        return self._channel

    def describe(self) -> str:
        """Returns which process it is."""
        return f"pid {self._line.pid(self.rank)} on {self._node.host}"

    def poll(self) -> str | None:
        """Returns how it ended, None while it lives."""
        self._line.take_reports(0.0)
        return self._line.ended(self.rank)

    def state(self) -> str | None:
        """Returns what its agent knows of a process that is silent."""
        return self._line.inspect(self.rank)

    def output_fileno(self) -> None:
        """Returns None: what it writes goes to the stderr of lamella-launch, marked as mpirun or srun mark it."""

    def forward_output(self) -> bool:
        """Has nothing to forward."""
        return False

    def last_words(self) -> str:
        """Returns nothing; see `output_fileno`."""
        return ""

    def kill(self) -> None:
        """Has its agent kill it and its children; never waits."""
        self._line.order(Kill(0, self.rank))

    def wait(self, timeout_s: float) -> bool:
        """Waits for its end; returns whether it has ended."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            self._line.take_reports(min(POLL_S, timeout_s))
        return self.poll() is not None
