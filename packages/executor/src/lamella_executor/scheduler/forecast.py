"""BlockForecast: how many KV blocks the running requests will hold, step by step.

Each running request is taken to advance one token per step from the step after its prompt on, and to give everything
back at its max_tokens. One that ends earlier only makes room. The forecast is kept as an array over the coming steps:
starting, ending and delaying a request costs one pass over its own remaining steps, a step that goes as foreseen
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lamella_executor.sequence import RequestState

_LEAST_STEPS = 1024  # of the array

Levels = np.ndarray  # [num_steps] int32: blocks held in one step after another


@dataclass(slots=True)
class _Course:
    """What one request is foreseen to hold: ``levels[t - first]`` in step t; before ``first``, ``levels[0]``."""

    first: int
    levels: Levels


class BlockForecast:
    """The blocks foreseen to be live in the present step (`tick` begins the next) and in those to come.

    Args:
        tokens_per_block: tokens a block holds.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._size = tokens_per_block
        self._blocks = np.zeros(_LEAST_STEPS, np.int32)  # by step, from step self._origin on
        self._origin = 0
        self._now = 0
        self._courses: dict[RequestState, _Course] = {}
        self._ramp = np.zeros(1, np.int32)  # blocks that hold 0, 1, 2, ... tokens

    @property
    def present(self) -> int:
        """Blocks foreseen for the present step."""
        return int(self._blocks[self._reach(1)])

    def tick(self) -> None:
        """The present step is over."""
        self._now += 1

    def growing(self, num_tokens: int, num_steps: int, num_shared: int) -> Levels:
        """Returns the levels of a sequence that grows by a token per step and is given back one step after its last.

        Args:
            num_tokens: in the cache after its first step.
            num_steps: that it takes part in, at least 1.
            num_shared: of its blocks, how many others hold too and account for.
        """
        last = num_tokens + num_steps - 1
        if last >= len(self._ramp):
            self._ramp = -(-np.arange(2 * last, dtype=np.int32) // self._size)
        levels = np.empty(num_steps + 1, np.int32)
        np.subtract(self._ramp[num_tokens : last + 1], num_shared, out=levels[:-1])
        levels[-1] = levels[-2]
        return levels

    def constant(self, num_blocks: int, num_steps: int) -> Levels:
        """Returns the levels of a request that holds at most ``num_blocks`` in each of its steps."""
        return np.full(num_steps + 1, num_blocks, np.int32)

    def peak_with(self, levels: Levels) -> int:
        """Returns the most blocks that will be held while a request with these levels runs, if it starts now."""
        start = self._reach(len(levels))
        return int((self._blocks[start : start + len(levels)] + levels).max())

    def add(self, request: RequestState, levels: Levels) -> None:
        """The request starts in the present step."""
        self._courses[request] = _Course(self._now, levels)
        start = self._reach(len(levels))
        self._blocks[start : start + len(levels)] += levels

    def delay(self, request: RequestState) -> None:
        """The request does not advance as foreseen in the present step: all its future comes one step later."""
        course = self._courses.get(request)
        if course is not None:
            self._apply(course, np.subtract)
            course.first += 1
            self._apply(course, np.add)

    def remove(self, request: RequestState) -> None:
        """The request has given back its blocks; harmless if it is not known."""
        course = self._courses.pop(request, None)
        if course is not None:
            self._apply(course, np.subtract)

    def _apply(self, course: _Course, operation: np.ufunc) -> None:
        """Adds or subtracts what remains of a course, from the present step on."""
        done = self._now - course.first
        remaining = course.levels[max(done, 0) :]
        start = self._reach(len(remaining) + max(-done, 0))
        if done < 0:
            ahead = self._blocks[start : start - done]
            operation(ahead, course.levels[0], out=ahead)
            start -= done
        if len(remaining):
            coming = self._blocks[start : start + len(remaining)]
            operation(coming, remaining, out=coming)

    def _reach(self, num_steps: int) -> int:
        """Makes room for that many steps from the present one on; returns where the present one is in the array."""
        start = self._now - self._origin
        if start + num_steps > len(self._blocks):
            coming = self._blocks[start:]  # shorter than num_steps
            blocks = np.zeros(max(_LEAST_STEPS, 2 * num_steps), np.int32)
            blocks[: len(coming)] = coming
            self._blocks, self._origin, start = blocks, self._now, 0
        return start
