"""AgentLauncher: starts workers through the agents of ``lamella-launch``, from the process of the user's command."""

from __future__ import annotations

import collections
import os
import socket
import sys
import time
from collections.abc import Mapping

from lamella_core.errors import ConfigError, WorkerError
from lamella_executor.worker.agents.messages import Connect, Start
from lamella_executor.worker.agents.network import (
    LOOPBACK,
    accept_peer,
    forced_address,
    listen,
    local_addresses,
    new_token,
)
from lamella_executor.worker.agents.remote import AgentLine, RemoteWorker
from lamella_executor.worker.channel import Channel
from lamella_executor.worker.launchers import AGENT_VARIABLE
from lamella_executor.worker.process import WorkerProcess

CONNECT_TIMEOUT_S = 30.0
START_TIMEOUT_S = 30.0
POLL_S = 0.05
CARRIED_PREFIXES = ("GLOO_", "HF_", "LAMELLA_", "MKL_", "NCCL_", "OMP_", "TORCH_", "TRITON_")


class AgentLauncher:
    """One session with the agents: its workers end when it is closed, or when this process ends."""

    def __init__(self, agent: str, world_size: int) -> None:
        """Connects the agents of ranks 1 to ``world_size - 1`` with this process.

        Args:
            agent: host, port and token of agent 0, as lamella-launch puts them into LAMELLA_AGENT.
            world_size: ranks of the session, this process included.

        Raises:
            ConfigError: fewer agents run than the session has ranks, or lamella-launch has ended.
            WorkerError: an agent cannot reach this host.
        """
        self._line = AgentLine(agent)
        try:
            self._nodes = self._line.nodes
            if world_size > len(self._nodes):
                raise ConfigError(
                    f"a session of {world_size} ranks needs {world_size} processes, lamella-launch was started with "
                    f"{len(self._nodes)}; remedy: mpirun -n {world_size} lamella-launch ..., or fewer ranks "
                    "(tensor_parallel_size x pipeline_parallel_size; an engine directory: build it again with "
                    f"lamella-build --tp_size {len(self._nodes)} --pp_size 1)"
                )
            self._connections = self._connect(range(1, world_size), forced_address(os.environ))
        except BaseException:
            self._line.close()
            raise
        self._hosts = self._find_hosts()

    @property
    def hosts(self) -> Mapping[int, str]:
        """Rank -> the address that the data plane uses to reach it."""
        return self._hosts

    @property
    def device_indices(self) -> Mapping[int, int]:
        """Rank -> the index of its GPU among those that its process sees."""
        return {node.rank: node.device_index for node in self._nodes}

    def launch(self, ranks: range, environment: Mapping[str, str]) -> list[WorkerProcess]:
        """Starts one worker for each rank on its agent's machine; see `Launcher.launch`.

        Raises:
            WorkerError: one could not be started; none is left.
        """
        carried = remote_environment(environment)
        for rank in ranks:
            self._line.order(Start(0, rank, carried))
        deadline = time.monotonic() + START_TIMEOUT_S
        for rank in ranks:
            while self._line.pid(rank) is None:
                self._check_start(rank, deadline, "start its worker", START_TIMEOUT_S)
                self._line.take_reports(POLL_S)
        return [RemoteWorker(self._nodes[rank], Channel(self._connections.pop(rank)), self._line) for rank in ranks]

    def close(self) -> None:
        """Ends the session; agents kill workers that are still there. Idempotent."""
        for connection in self._connections.values():
            connection.close()
        self._line.close()

    def _connect(self, ranks: range, forced: str | None) -> dict[int, socket.socket]:
        """Returns a connection to the agent of each rank, which its worker will inherit."""
        one_machine = forced is None and all(self._nodes[rank].node == self._nodes[0].node for rank in ranks)
        token = new_token()
        connections: dict[int, socket.socket] = {}
        with listen(forced or (LOOPBACK if one_machine else "")) as listener:
            port = listener.getsockname()[1]
            addresses = [forced] if forced else [LOOPBACK] if one_machine else local_addresses()
            for rank in ranks:
                self._line.order(Connect(0, rank, [(address, port) for address in addresses], token))
            deadline = time.monotonic() + CONNECT_TIMEOUT_S
            try:
                while len(connections) < len(ranks):
                    peer = accept_peer(listener, token, POLL_S)
                    if peer is not None:
                        connections[peer[0]] = peer[1]
                    self._line.take_reports(0.0)
                    for rank in set(ranks) - set(connections):
                        self._check_start(rank, deadline, "connect", CONNECT_TIMEOUT_S)
            except BaseException:
                for connection in connections.values():
                    connection.close()
                raise
        return connections

    def _check_start(self, rank: int, deadline: float, what: str, timeout_s: float) -> None:
        """Checks that the worker of ``rank`` may still come.

        Raises:
            WorkerError: it will not; the session is closed, which ends the others.
        """
        how = self._line.ended(rank)
        if how is None and time.monotonic() > deadline:
            how = f"did not start: the agent did not {what} within {timeout_s:g} s"
        if how is not None:
            self._line.close()
            raise WorkerError(f"worker of rank {rank} on {self._nodes[rank].host} {how}")

    def _find_hosts(self) -> dict[int, str]:
        """Returns each rank's address as it is seen by the others.

        Ranks beside rank 0 have the address of this host that most of the other machines have reached.
        """
        reached = collections.Counter(
            connection.getsockname()[0]
            for rank, connection in self._connections.items()
            if self._nodes[rank].node != self._nodes[0].node
        )
        own = reached.most_common(1)[0][0] if reached else None
        hosts = {}
        for rank, connection in self._connections.items():
            beside = self._nodes[rank].node == self._nodes[0].node
            hosts[rank] = own if beside and own else connection.getpeername()[0]
        return {0: own or next(iter(hosts.values()), LOOPBACK), **hosts}


def remote_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Returns what is added to the environment of a worker on another machine.

    That machine has its own paths and devices: of this process's environment only the settings of the libraries at work
    are carried over, and a Python path that finds the same modules as here, which every machine is expected to have.
    """
    settings = {name: value for name, value in os.environ.items() if name.startswith(CARRIED_PREFIXES)}
    settings.pop(AGENT_VARIABLE, None)
    here = [path or os.getcwd() for path in sys.path]
    first = [extra["PYTHONPATH"]] if "PYTHONPATH" in extra else []
    return {**settings, **extra, "PYTHONPATH": os.pathsep.join(first + here), "PYTHONSAFEPATH": "1"}
