"""Targets of engine recipes: what ranks load, and how they fail at it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lamella_core.engine import Engine


def plain(*, directory: str, rank: int) -> Engine:
    return Engine.load(directory, rank)


def sleepy(*, directory: str, rank: int, marks: str, seconds: float) -> Engine:
    """Leaves a file that says the rank is loading, then takes its time."""
    Path(marks, f"loading{rank}").write_text(str(os.getpid()))
    for _ in range(int(seconds * 100)):
        time.sleep(0.01)
    return Engine.load(directory, rank)


def broken(*, directory: str, rank: int, where: int) -> Engine:
    """Fails on one rank."""
    if rank == where:
        raise ValueError(f"no weights for rank {rank}")
    return Engine.load(directory, rank)


def first_always(*, directory: str, rank: int) -> Engine:
    """Returns rank 0's engine to everybody."""
    return Engine.load(directory, 0)


not_a_function = 3
