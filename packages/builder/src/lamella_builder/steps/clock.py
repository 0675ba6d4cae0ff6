"""Step times and progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# step name, units done, units in all; called at the start (0 done), on the way, and at the end of each step
Progress = Callable[[str, int, int], None]
Advance = Callable[[int, int], None]  # the same within one step


class StepClock:
    """Records the seconds that each step takes and reports progress.

    Attributes:
        seconds: wall time per finished step, in order.
        progress: what it reports to.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    @contextmanager
    def step(self, name: str) -> Iterator[Advance]:
        """Times the block; the value it yields reports units done within the step."""
        totals = [1]

        def advance(done: int, total: int) -> None:
            totals[0] = max(total, 1)
            if self.progress is not None:
                self.progress(name, done, totals[0])

        advance(0, 1)
        begin = time.perf_counter()
        yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        advance(totals[0], totals[0])
