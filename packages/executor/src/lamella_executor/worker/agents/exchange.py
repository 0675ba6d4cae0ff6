"""Messages between agents: raw bytes over MPI point-to-point calls, no pickle, no busy waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from lamella_core.errors import ConfigError
from lamella_executor.worker.agents.messages import AgentMessage, decode, encode

TAG = 1
POLL_S = 0.02


class Exchange:
    """One agent's mail over a communicator of its own. Call `receive` and `progress` every few milliseconds."""

    def __init__(self, communicator: Any, mpi: ModuleType) -> None:
        self._mpi = mpi
        self._communicator = communicator
        self._sending: list[tuple[Any, bytes]] = []
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()

    def send(self, message: AgentMessage, rank: int) -> None:
        """Starts to send ``message`` to the agent ``rank``; `progress` ends it."""
        payload = encode(message)
        request = self._communicator.Isend([payload, self._mpi.BYTE], dest=rank, tag=TAG)
        self._sending.append((request, payload))

    def receive(self) -> Iterator[AgentMessage]:
        """Yields the messages that have arrived."""
        status = self._mpi.Status()
        while self._communicator.Iprobe(source=self._mpi.ANY_SOURCE, tag=TAG, status=status):
            payload = bytearray(status.Get_count(self._mpi.BYTE))
            self._communicator.Recv([payload, self._mpi.BYTE], source=status.Get_source(), tag=TAG)
            yield decode(payload)

    def progress(self) -> bool:
        """Ends sends that are complete; returns whether none is left."""
        self._sending = [(request, payload) for request, payload in self._sending if not request.Test()]
        return not self._sending

    def leave(self) -> None:
        """Returns when no agent has anything left to send: before that, none may finalize MPI.

        `MPI_Finalize` itself does not wait for the others everywhere, and a message to an agent that is gone aborts.
        """
        leaving = None
        while leaving is None or not leaving.Test():
            for _ in self.receive():  # too late for it to matter
                continue
            if self.progress() and leaving is None:
                leaving = self._communicator.Ibarrier()
            time.sleep(POLL_S)


def load_mpi() -> ModuleType:
    """Imports mpi4py, which initializes MPI.

    Raises:
        ConfigError: mpi4py or an MPI library is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"mpi4py and an MPI library are needed ({error}); remedy: pip install 'lamella-executor[mpi]', "
            "and start it with the mpirun or srun of the MPI library that mpi4py finds"
        ) from error
    return MPI
