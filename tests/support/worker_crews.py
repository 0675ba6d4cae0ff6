"""Crews of workers that run `tests.support.worker_tasks`, and what of them is left."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamella_executor.worker.channel import STEP
from lamella_executor.worker.crew import Crew
from lamella_executor.worker.local import LocalLauncher
from lamella_executor.worker.messages import Load, Setup, Start

SERVE = "tests.support.worker_tasks:serve"


def make_setup(world_size: int, *, worker_timeout_s: float = 30.0, serve: str = SERVE) -> Setup:
    return Setup(
        rank=0,
        world_size=world_size,
        store_host="127.0.0.1",
        store_port=1,
        mapping={"world_size": world_size, "rank": 0},
        device="cpu",
        device_index=0,
        num_threads=1,
        worker_timeout_s=worker_timeout_s,
        log_level=logging.INFO,
        serve=serve,
    )


def make_crew(world_size: int = 2, *, worker_timeout_s: float = 30.0, **options: Any) -> Crew:
    options.setdefault("on_failure", lambda error: None)
    return Crew(
        options.pop("launcher", None) or LocalLauncher(world_size),
        make_setup(world_size, worker_timeout_s=worker_timeout_s, serve=options.pop("serve", SERVE)),
        worker_timeout_s=worker_timeout_s,
        **options,
    )


def go_to(crew: Crew, phase: str, deeds: bytes) -> None:
    """Brings the workers to where ``phase`` begins, and gives them their orders in it."""
    crew.set_phase(phase)
    if phase == "load":
        crew.broadcast(Load("m:f", deeds))
    elif phase == "start":
        crew.broadcast(Start(deeds))
    else:
        crew.broadcast_frame(STEP, deeds)


def orders(**deeds: list[Any]) -> bytes:
    """``orders(rank1=["exit", 3])`` as `worker_tasks` reads them."""
    return json.dumps({name.removeprefix("rank"): deed for name, deed in deeds.items()}).encode()


def pids_of(crew: Crew) -> list[int]:
    return [int(member.process.describe().split()[1]) for member in crew._watch.members]


def is_alive(pid: int) -> bool:
    return _processes().get(pid, ("Z", 0))[0] != "Z"


def children() -> set[int]:
    """Returns this process's children and theirs, zombies too."""
    processes = _processes()
    found = {os.getpid()}
    while more := {pid for pid, (_, parent) in processes.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _processes() -> dict[int, tuple[str, int]]:
    """Returns pid -> state letter, parent."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        found[int(directory.name)] = (fields[0], int(fields[1]))
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def belongings() -> tuple[set[int], list[str], list[str]]:
    """Returns this process's children, sockets and pipes, and crews' threads."""
    descriptors = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            descriptors.append(os.readlink(link))
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("lamella-watch")]
    return children(), sorted(name for name in descriptors if name.startswith(("socket:", "pipe:"))), threads
