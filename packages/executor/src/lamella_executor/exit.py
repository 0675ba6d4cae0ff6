"""What waits for threads when the interpreter ends."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_at_exit(wait: Callable[[float], object], timeout_s: float) -> None:
    """Calls ``wait`` with the seconds that are left of ``timeout_s``; after a Ctrl-C again, until it has returned.

    An interpreter that goes on to its end under a thread that computes aborts the process, so a second Ctrl-C must not
    end the wait that the first one led to.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            wait(max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            continue
        return
