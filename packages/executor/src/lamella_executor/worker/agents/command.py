"""Agent 0: runs the user's command, and carries orders and reports between its launchers and the other agents."""

from __future__ import annotations

import selectors
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

import msgspec

from lamella_executor.worker.agents.agent import child_environment, guarded, has_ended, signal_group
from lamella_executor.worker.agents.exchange import POLL_S, Exchange
from lamella_executor.worker.agents.messages import (
    AgentMessage,
    Connect,
    Ended,
    Forget,
    Inspect,
    Inspected,
    Job,
    Kill,
    Node,
    Quit,
    Start,
    Started,
    receive,
    send,
)
from lamella_executor.worker.agents.network import LOOPBACK, accept_peer, listen, new_token
from lamella_executor.worker.channel import Channel, ChannelError
from lamella_executor.worker.launchers import AGENT_VARIABLE

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ACCEPT_TIMEOUT_S = 0.05


class CommandAgent:
    """Agent 0 of a job. Each connection from the command or its children is one session."""

    def __init__(self, exchange: Exchange, nodes: Sequence[Node]) -> None:
        self._exchange = exchange
        self._nodes = sorted(nodes, key=lambda node: node.rank)
        self._token = new_token()
        self._listener = listen(LOOPBACK)
        self._sessions: dict[int, Channel] = {}
        self._num_sessions = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def run(self, command: Sequence[str]) -> int:
        """Runs ``command`` to its end and tells the other agents; returns its exit code (128 + number for a signal)."""
        port = self._listener.getsockname()[1]
        environment = child_environment({AGENT_VARIABLE: f"{LOOPBACK}:{port}:{self._token.hex()}"})
        child = subprocess.Popen(guarded(list(command)), env=environment, start_new_session=True)
        _forward_signals(child)
        while not has_ended(child):
            self._carry_orders()
            self._carry_reports()
        ignore_signals()  # this process's end is near, and its exit code the command's
        signal_group(child, signal.SIGKILL)
        code = child.wait()
        code = code if code >= 0 else 128 - code
        for rank in range(1, self._exchange.size):
            self._exchange.send(Quit(code), rank)
        self._listener.close()
        return code

    def _carry_orders(self) -> None:
        for key, _ in self._selector.select(POLL_S):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._carry_from(key.data)

    def _accept(self) -> None:
        peer = accept_peer(self._listener, self._token, ACCEPT_TIMEOUT_S)
        if peer is None:
            return
        self._num_sessions += 1
        session, channel = self._num_sessions, Channel(peer[1])
        self._sessions[session] = channel
        self._selector.register(channel, selectors.EVENT_READ, session)
        self._send(session, Job(self._nodes))

    def _carry_from(self, session: int) -> None:
        try:
            while (order := receive(self._sessions[session])) is not None:
                if not isinstance(order, Connect | Start | Kill | Inspect) or not 0 < order.rank < self._exchange.size:
                    raise ChannelError(f"not an order for an agent: {type(order).__name__}")
                self._exchange.send(msgspec.structs.replace(order, session=session), order.rank)
        except (EOFError, OSError, msgspec.DecodeError):
            self._close(session)

    def _carry_reports(self) -> None:
        for report in self._exchange.receive():
            if isinstance(report, Started | Ended | Inspected) and report.session in self._sessions:
                self._send(report.session, report)
        self._exchange.progress()

    def _send(self, session: int, message: AgentMessage) -> None:
        try:
            send(self._sessions[session], message)
        except OSError:
            self._close(session)

    def _close(self, session: int) -> None:
        """Ends a session whose launcher is gone: so do its workers."""
        channel = self._sessions.pop(session)
        self._selector.unregister(channel)
        channel.close()
        for rank in range(1, self._exchange.size):
            self._exchange.send(Forget(session), rank)


def _forward_signals(command: subprocess.Popen[bytes]) -> None:
    """Passes signals to the command's process group, which is its own: it gets each of them once."""

    def forward(number: int, frame: FrameType | None) -> None:
        signal_group(command, number)

    for number in FORWARDED_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, forward)


def ignore_signals() -> None:
    """Leaves signals to others; children started from now on inherit this."""
    for number in FORWARDED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
