"""find_launcher: on one machine or many, as this process was started."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lamella_core.errors import ConfigError
from lamella_executor.worker.agents.detection import mpi_place
from lamella_executor.worker.local import LocalLauncher
from lamella_executor.worker.process import Launcher

AGENT_VARIABLE = "LAMELLA_AGENT"  # set by lamella-launch for the user's program
REMEDY = "start it as `mpirun -n RANKS lamella-launch python script.py` (`srun --mpi=pmix lamella-launch ...`)"


def find_launcher(world_size: int) -> Launcher:
    """Returns what starts the workers of an engine of ``world_size`` ranks.

    Raises:
        ConfigError: the user's script itself was started several times, by mpirun or srun without lamella-launch, and
            this is not the first, or there are several machines; or lamella-launch has too few ranks.
    """
    agent = os.environ.get(AGENT_VARIABLE)
    if agent:
        from lamella_executor.worker.agents.launcher import AgentLauncher

        return AgentLauncher(agent, world_size)
    if world_size > 1:
        check_started_once(os.environ)
    return LocalLauncher(world_size)


def check_started_once(environment: Mapping[str, str]) -> None:
    """Refuses to start workers from any but the first of several copies of the user's script; see `find_launcher`."""
    place = mpi_place(environment)
    if place is None or place.size == 1:
        return
    if place.rank != 0:
        raise ConfigError(
            f"only rank 0 can start multi-node session, got {place.rank} ({place.source}); {REMEDY}, which runs the "
            "script once"
        )
    if place.size is not None and place.num_local is not None and place.num_local < place.size:
        raise ConfigError(
            f"{place.source} says that this script was started {place.size} times on several machines, but workers "
            f"would run on this one only; {REMEDY}"
        )
