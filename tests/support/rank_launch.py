"""Starts the processes of ranks that `rank_process` runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from lamella_executor.distributed.store import host_store

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def ranks(
    task: str, world: int, tp: int, first: int = 0, module: str = "rank_process"
) -> Iterator[tuple[TCPStore, list[subprocess.Popen[str]]]]:
    """Starts processes for ranks first.. and yields (store, processes); kills them all in the end."""
    store = host_store()
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(first, world):
            command = [sys.executable, "-m", f"tests.support.{module}", task, *map(str, (world, tp, rank, store.port))]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment))
        yield store, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def answers(task: str, world: int, tp: int, module: str = "rank_process", timeout_s: float = 120.0) -> list[Any]:
    """Returns what each rank's task returned; None of a rank that did not end by itself."""
    with ranks(task, world, tp, module=module) as (_, processes):
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
        return [json.loads(output) if output else None for output in outputs]
