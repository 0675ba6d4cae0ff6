"""RankPool: ranks built in processes of their own, several at a time, each rank's weights in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from lamella_builder.rank_source import RankSource
from lamella_builder.steps import Progress
from lamella_core import errors
from lamella_core.engine import EngineSpec
from lamella_core.errors import LamellaError, WorkerError

STEPS = ("read weights", "resolve limits", "plan memory", "move weights", "cast", "choose kernels", "lay out weights",
         "write engine")  # fmt: skip
_TAIL_CHARACTERS = 2000  # of what a process that died had printed


class RankPool:
    """Builds ranks in at most ``workers`` processes at once; use it as a context manager, which ends all of them.

    Args:
        source: the ranks.
        directory: where their files go.
        workers: processes at once.
        progress: told of each rank as a step: how many of `STEPS` it has begun. Called from several threads, one at a
            time.
        num_devices: GPUs that the processes share out; 0 on a CPU.
    """

    def __init__(
        self,
        source: RankSource,
        directory: Path,
        workers: int,
        progress: Progress | None = None,
        num_devices: int = 0,
    ) -> None:
        self._task = {"source": source.to_dict(), "directory": str(directory.resolve())}
        self._workers = workers
        self._progress, self._lock = progress, threading.Lock()
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(workers):
            self._slots.put(slot % num_devices if num_devices else 0)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="build-rank")
        self._processes: set[subprocess.Popen[str]] = set()
        self._closed = False

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def build(self, ranks: Sequence[int], like: EngineSpec | None) -> list[tuple[EngineSpec, dict[str, Any]]]:
        """Builds ranks side by side; returns the spec and the file's entry (see `EngineWriter.adopt_rank`) of each.

        Raises:
            LamellaError: of the class that a rank's build raised; the message begins with the rank.
            WorkerError: a rank's process died, or something unforeseen happened in it.
        """
        at_once = min(self._workers, len(ranks))
        futures = [self._threads.submit(self._run, rank, like, at_once) for rank in ranks]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return [future.result() for future in futures]

    def _run(self, rank: int, like: EngineSpec | None, at_once: int) -> tuple[EngineSpec, dict[str, Any]]:
        slot = self._slots.get()
        try:
            task = {**self._task, "rank": rank, "device_index": slot, "like": None if like is None else like.to_dict()}
            with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
                return self._follow(rank, self._start(task, at_once, printed), printed)
        finally:
            self._slots.put(slot)

    def _start(self, task: dict[str, Any], at_once: int, printed: IO[str]) -> subprocess.Popen[str]:
        threads = max(1, _usable_cores() // at_once)
        with self._lock:
            if self._closed:
                raise WorkerError(f"rank {task['rank']} was not built: another one failed")
            process = subprocess.Popen(
                [sys.executable, "-m", "lamella_builder.rank_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                encoding="utf-8",
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            self._processes.add(process)
        if process.stdin is not None:
            with suppress(BrokenPipeError):  # it died at once; `_follow` tells how
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
        return process

    def _follow(self, rank: int, process: subprocess.Popen[str], printed: IO[str]) -> tuple[EngineSpec, dict[str, Any]]:
        """Reads what the process tells until it ends."""
        begun, last = 0, "start"
        try:
            for line in process.stdout or ():
                if not line.endswith("\n"):
                    break  # it died while it wrote
                message = json.loads(line)
                if "step" in message:
                    begun, last = begun + 1, message["step"]
                    self._report(rank, min(begun, len(STEPS)) - 1)
                elif "message" in message:
                    raise _error(rank, message)
                else:
                    self._report(rank, len(STEPS))
                    return EngineSpec.from_dict(message["spec"]), message["entry"]
            raise _death(rank, process.wait(), last, printed)
        finally:
            with self._lock:
                self._processes.discard(process)
            process.kill()
            process.communicate()

    def _report(self, rank: int, done: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress(f"rank {rank}", done, len(STEPS))


def _error(rank: int, message: dict[str, Any]) -> LamellaError:
    """Returns the error that the process told, as its own class."""
    kind = getattr(errors, str(message["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, LamellaError)):
        kind = WorkerError
    return kind(f"rank {rank}: {message['message']}")


def _death(rank: int, code: int, step: str, printed: IO[str]) -> WorkerError:
    how = f"exited with code {code}"
    if code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        how += "; perhaps memory ran out: lower --workers" if -code == signal.SIGKILL else ""
    printed.seek(0)
    tail = printed.read()[-_TAIL_CHARACTERS:].strip()
    said = f". It said: {tail}" if tail else ""
    return WorkerError(f"the process that builds rank {rank} {how}, in step {step!r}{said}")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
