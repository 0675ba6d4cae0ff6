"""Whether this process was started as one of several ranks, as the environment of the common launchers tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# rank, size, ranks on this machine; a batch script has Slurm's SLURM_PROCID too, but no step
_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
    ("PMIX_RANK", "PMIX_SIZE", ""),
)


@dataclass(frozen=True)
class MpiPlace:
    """This process's place in its job; ``size`` and ``num_local`` (ranks on this machine) are None if unknown."""

    rank: int
    size: int | None
    num_local: int | None
    source: str


def mpi_place(environ: Mapping[str, str]) -> MpiPlace | None:
    """Returns this process's place among the ranks of mpirun or srun, None if neither started it."""
    for rank, size, num_local in _VARIABLES:
        if rank.startswith("SLURM_") and size not in environ:
            continue
        value = _number(environ, rank)
        if value is not None:
            return MpiPlace(value, _number(environ, size), _number(environ, num_local), rank)
    return None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """Returns the number that a variable begins with ("2(x3)" is Slurm's way to say 2 on each of 3 machines)."""
    digits = environ.get(name, "").partition("(")[0].partition(",")[0]
    return int(digits) if digits.isdecimal() else None
