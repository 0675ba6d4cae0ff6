"""Progress bars that leave nothing behind: no thread, no semaphore."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Bar(tqdm):
    """A tqdm bar that starts no monitor thread, which would outlive every LLM, and locks within this process only."""

    monitor_interval = 0
    _lock = threading.RLock()


@contextmanager
def shown_progress(shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yields a callback that draws the steps of a build one after another, or None."""
    if not shown:
        yield None
        return
    bar = Bar(desc="build", unit="unit")

    def update(step: str, done: int, total: int) -> None:
        bar.set_description(step, refresh=False)
        bar.n, bar.total = done, total
        bar.refresh()

    try:
        yield update
    finally:
        bar.close()
