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

from tests.support.warm_python import WarmProcess, WarmPython
from torch.distributed import TCPStore

from lamella_executor.distributed.store import host_store

ROOT = Path(__file__).resolve().parents[2]


Process = subprocess.Popen[str] | WarmProcess


@contextlib.contextmanager
def ranks(
    task: str, world: int, tp: int, first: int = 0, module: str = "rank_process", python: WarmPython | None = None
) -> Iterator[tuple[TCPStore, list[Process]]]:
    """Starts processes for ranks first.. and yields (store, processes); kills them all in the end.

    With ``python``, it starts them.
    """
    store = host_store()
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    processes: list[Process] = []
    try:
        for rank in range(first, world):
            arguments = [task, *map(str, (world, tp, rank, store.port))]
            if python is not None:
                code = f"from tests.support.{module} import main\nmain()"
                processes.append(python.start(code, *arguments, cwd=ROOT, stderr=2))
                continue
            command = [sys.executable, "-m", f"tests.support.{module}", *arguments]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment))
        yield store, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def answers(
    task: str,
    world: int,
    tp: int,
    module: str = "rank_process",
    timeout_s: float = 120.0,
    python: WarmPython | None = None,
) -> list[Any]:
    """Returns what each rank's task returned; None of a rank that did not end by itself."""
    with ranks(task, world, tp, module=module, python=python) as (_, processes):
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
        return [json.loads(output) if output else None for output in outputs]
