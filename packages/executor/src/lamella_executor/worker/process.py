"""What `Crew` needs of the processes of other ranks, wherever they run."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Protocol

from lamella_executor.worker.channel import Channel


class WorkerProcess(Protocol):
    """One worker. Only the crew's watcher thread calls it; `kill` may be called by any thread."""

    @property
    def rank(self) -> int: ...

    @property
    def channel(self) -> Channel: ...

    def describe(self) -> str:
        """Returns which process it is: "pid 1234", "pid 77 on node2"."""
        ...

    def poll(self) -> str | None:
        """Returns how it ended ("was killed by signal 9 (SIGKILL)", "exited with code 3"), None while it lives."""
        ...

    def state(self) -> str | None:
        """Returns what is known about a process that lives but is silent ("is stopped (SIGSTOP?)"), or None."""
        ...

    def output_fileno(self) -> int | None:
        """Returns what becomes readable when it has written to stdout or stderr; None if that is not captured."""
        ...

    def forward_output(self) -> bool:
        """Passes on what it has written, without waiting; returns whether more may come."""
        ...

    def last_words(self) -> str:
        """Returns the end of what it wrote to stdout and stderr, as far as that is captured."""
        ...

    def kill(self) -> None:
        """Kills it and its children with SIGKILL; idempotent, never waits."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Waits for its end; returns whether it has ended and been reaped."""
        ...


class Launcher(Protocol):
    """Starts workers; used by one `Crew`, which closes it."""

    @property
    def hosts(self) -> Mapping[int, str]:
        """Rank -> the address that the data plane uses to reach it."""
        ...

    @property
    def device_indices(self) -> Mapping[int, int]:
        """Rank -> the index of its GPU among those that its process sees."""
        ...

    def launch(self, ranks: range, environment: Mapping[str, str]) -> list[WorkerProcess]:
        """Starts one process for each rank, with ``environment`` added to the usual one.

        Raises:
            WorkerError: one could not be started; none is left.
        """
        ...

    def close(self) -> None:
        """Gives back what the launcher itself holds, not the workers; idempotent."""
        ...


def describe_exit(code: int) -> str:
    """Returns how a process ended, given its exit code as `subprocess` has it (a negative one is a signal's number)."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-code} ({name})"
