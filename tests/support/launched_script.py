"""What lamella-launch runs in tests: a script whose sessions have workers on other ranks.

    python launched_script.py WORLD_SIZE TASK

prints what it saw as one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from lamella_core.errors import ConfigError, WorkerError
from lamella_executor.worker.crew import Crew
from lamella_executor.worker.launchers import find_launcher
from lamella_executor.worker.messages import Load, Setup

EXIT_CODE = 7
TIMEOUT_S = 20.0


def say(seen: object) -> None:
    sys.stdout.write(json.dumps(seen) + "\n")
    sys.stdout.flush()


def start_crew(world_size: int, failures: list[WorkerError]) -> Crew:
    launcher = find_launcher(world_size)
    setup = Setup(
        rank=0, world_size=world_size, store_host=launcher.hosts[0], store_port=1, mapping={}, device="cpu",
        device_index=0, num_threads=1, worker_timeout_s=TIMEOUT_S, log_level=30,
        serve="tests.support.worker_tasks:serve",
    )  # fmt: skip
    return Crew(launcher, setup, worker_timeout_s=TIMEOUT_S, on_failure=failures.append)


def load(crew: Crew, deeds: dict[int, list[object]]) -> None:
    crew.set_phase("load")
    crew.broadcast(Load("", json.dumps(deeds).encode()))
    crew.wait_ready("load", TIMEOUT_S)


def sessions(world_size: int) -> dict[str, object]:
    """Sessions: a fine one; one whose worker is killed; two side by side; one with more ranks than there are."""
    failures: list[WorkerError] = []
    crew = start_crew(world_size, failures)
    load(crew, {})
    crew.stop(TIMEOUT_S)
    crew = start_crew(world_size, failures)
    began = time.monotonic()
    try:
        load(crew, {world_size - 1: ["signal", int(signal.SIGKILL)]})
    except WorkerError as error:
        killed, seconds = str(error), time.monotonic() - began
    crew.stop(TIMEOUT_S)
    crew, other = start_crew(world_size, failures), start_crew(2, failures)
    for each in (other, crew):
        load(each, {})
    for each in (crew, other):
        each.stop(TIMEOUT_S)
    try:
        find_launcher(world_size + 1)
    except ConfigError as error:
        too_large = str(error)
    return {"killed": killed, "seconds": seconds, "failures": len(failures), "too_large": too_large}


def orphan(world_size: int) -> None:
    """Says which process its worker is, and is killed; the worker has been stopped, so it cannot notice by itself."""
    crew = start_crew(world_size, [])
    load(crew, {})
    process = crew._watch.members[0].process
    pid = int(process.describe().split()[1])
    os.kill(pid, signal.SIGSTOP)
    say({"worker": pid, "state": process.state()})
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_signal(world_size: int) -> None:
    """Answers a SIGTERM by saying so; its workers must still be there."""
    crew = start_crew(world_size, [])

    def answer(number: int, frame: object) -> None:
        load(crew, {})
        say({"signal": number})
        crew.stop(TIMEOUT_S)
        sys.exit(EXIT_CODE)

    signal.signal(signal.SIGTERM, answer)
    say({"script": os.getpid(), "agent": os.getppid()})
    time.sleep(TIMEOUT_S)


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parents[2]))  # workers find this repository's tests by it
    task = {"sessions": sessions, "orphan": orphan, "wait_for_signal": wait_for_signal}[sys.argv[2]]
    say(task(int(sys.argv[1])))
    return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
