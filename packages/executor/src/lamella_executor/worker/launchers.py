"""find_launcher: on one machine or many, as this process was started."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lamella_core.errors import ConfigError
from lamella_executor.worker.local import LocalLauncher
from lamella_executor.worker.process import Launcher

AGENT_VARIABLE = "LAMELLA_AGENT"  # set by lamella-launch for the user's program
REMEDY = "start it as `mpirun -n NODES lamella-launch python script.py` (or `srun --mpi=pmix lamella-launch ...`)"

# (number of processes, this one's rank, a number that is smaller, or of nodes, if there are several nodes)
_MPIRUN = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_HYDRA = ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS")
_SRUN = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NUM_NODES")


def find_launcher(world_size: int) -> Launcher:
    """Returns what starts the workers of an engine of ``world_size`` ranks.

    Raises:
        ConfigError: the user's script itself was started several times, by mpirun or srun without lamella-launch, and
            this is not the first, or there are several nodes.
    """
    if os.environ.get(AGENT_VARIABLE):
        from lamella_executor.worker.agent_launcher import AgentLauncher

        return AgentLauncher(os.environ[AGENT_VARIABLE], world_size)
    if world_size > 1:
        check_started_once(os.environ)
    return LocalLauncher(world_size)


def check_started_once(environment: Mapping[str, str]) -> None:
    """Refuses to start workers from any but the first of several copies of the user's script; see `find_launcher`."""
    for size_name, rank_name, local_name in (_MPIRUN, _HYDRA, _SRUN):
        size = _number(environment, size_name, 1)
        if size == 1:
            continue
        rank = _number(environment, rank_name, 0)
        if rank != 0:
            raise ConfigError(f"only rank 0 can start multi-node session, got {rank}; {REMEDY}: the script runs once")
        local = _number(environment, local_name, size)
        num_nodes = local if local_name == _SRUN[2] else -(-size // local)
        if num_nodes > 1:
            raise ConfigError(
                f"this script was started {size} times on {num_nodes} nodes, and workers would run on this node only; "
                f"{REMEDY}"
            )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else default
