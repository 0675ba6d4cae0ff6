"""``lamella-launch COMMAND...``: runs a command once, on rank 0 of an MPI job whose other ranks hold its workers.

Every rank of ``mpirun -n N lamella-launch COMMAND`` (or of ``srun``) is an agent. Agent 0 runs the command, the others
start workers for the engines that it makes, and all exit with its code.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from types import ModuleType

import numpy as np

from lamella_core.errors import ConfigError
from lamella_executor.worker.agents.agent import Agent, child_environment
from lamella_executor.worker.agents.command import CommandAgent, ignore_signals
from lamella_executor.worker.agents.detection import mpi_place
from lamella_executor.worker.agents.exchange import POLL_S, Exchange, load_mpi
from lamella_executor.worker.agents.guard import become
from lamella_executor.worker.agents.messages import Node

USAGE = """usage: mpirun -n N --bind-to none lamella-launch COMMAND [ARGUMENT...]
       srun -n N --mpi=pmix lamella-launch COMMAND [ARGUMENT...]

Runs COMMAND once, on rank 0; the other ranks hold the workers of the engines that it makes. For example:
  mpirun -n 2 --bind-to none lamella-launch python script.py
  mpirun -n 2 --bind-to none lamella-launch lamella bench throughput --tensor_parallel_size 2 ...
"""
USAGE_ERROR = 2
FEW_CPUS = 2


def main() -> int:
    """Runs the command of ``sys.argv``; returns its exit code."""
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        (sys.stdout if command else sys.stderr).write(USAGE)
        return 0 if command else USAGE_ERROR
    try:
        mpi = load_mpi()
        if mpi.COMM_WORLD.Get_size() == 1:
            return _run_alone(command, mpi)
    except ConfigError as error:
        sys.stderr.write(f"lamella-launch: {error}\n")
        return 1
    try:
        code = _run_agent(command, mpi)
    except BaseException:  # whatever ends one agent ends the job: the others would wait for ever
        traceback.print_exc()
        mpi.COMM_WORLD.Abort(1)
        raise
    mpi.Finalize()
    return code


def _run_alone(command: list[str], mpi: ModuleType) -> int:
    """Becomes the command: with no other agent, an engine's workers are children of the command itself.

    Raises:
        ConfigError: the job has other ranks, which the MPI library does not see.
    """
    place = mpi_place(os.environ)
    if place is not None and (place.size or place.rank + 1) > 1:
        library = mpi.Get_library_version().splitlines()[0][:60].strip(" \0")
        raise ConfigError(
            f"rank {place.rank} of {place.size or 'several'} ({place.source}) is alone for the MPI library that mpi4py "
            f"found ({library}): library and launcher do not fit together; remedy: start the job with that library's "
            "own mpirun, or with the srun --mpi=... that it was built for, or name another library with MPI4PY_LIBMPI"
        )
    mpi.Finalize()
    return become(command, child_environment({}))


def _run_agent(command: list[str], mpi: ModuleType) -> int:
    """Serves as the agent of this rank until the command has ended; returns its exit code."""
    node, num_local = _find_node(mpi)
    exchange = Exchange(mpi.COMM_WORLD.Dup(), mpi)
    if node.rank > 0:
        ignore_signals()  # the command answers them, and workers are to be there when it does
        exchange.send(node, 0)
        code = Agent(exchange).run()
    else:
        _warn_if_bound(num_local)
        nodes = [node]
        while len(nodes) < exchange.size:
            nodes += [message for message in exchange.receive() if isinstance(message, Node)]
            time.sleep(POLL_S)
        code = CommandAgent(exchange, nodes).run(command)
    exchange.leave()
    return code


def _find_node(mpi: ModuleType) -> tuple[Node, int]:
    """Returns where this agent runs, and how many agents share its machine."""
    rank = mpi.COMM_WORLD.Get_rank()
    neighbours = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)
    first = np.array([rank], dtype=np.int32)
    neighbours.Bcast([first, mpi.INT32_T], root=0)
    local_rank, num_local = neighbours.Get_rank(), neighbours.Get_size()
    neighbours.Free()
    node = Node(rank, socket.gethostname(), int(first[0]), local_rank, _device_index(local_rank))
    return node, num_local


def _device_index(local_rank: int) -> int:
    """Returns the index of this rank's GPU among the visible ones: a manager may show each rank only its own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return 0 if visible.strip() and len(visible.split(",")) == 1 else local_rank


def _warn_if_bound(num_local: int) -> None:
    if not hasattr(os, "sched_getaffinity"):
        return
    num_cpus = len(os.sched_getaffinity(0))
    if num_cpus <= FEW_CPUS and (os.cpu_count() or 1) > FEW_CPUS * num_local:
        sys.stderr.write(
            f"lamella-launch: rank 0 may use {num_cpus} of {os.cpu_count()} CPUs; mpirun --bind-to none (or srun "
            "--cpus-per-task) gives it more\n"
        )


if __name__ == "__main__":
    sys.exit(main())
