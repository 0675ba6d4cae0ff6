"""Numbers about the engine's iterations and about each request. Times are seconds of the monotonic clock."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class IterationStats:
    """One iteration of the engine's loop: a step is launched, and the step before it or itself collected.

    Steps overlap where the runner computes while the loop goes on (see docs/executor.md): the times are then those of
    the step collected, the token counts those of the step launched, and either may be missing (0).
    ``num_live_blocks + num_cached_blocks + num_free_blocks`` is the size of the KV cache.
    """

    iteration: int
    timestamp_s: float  # time.time() at the end of the step
    latency_s: float  # the whole iteration: schedule, launch, wait, sample, update
    forward_s: float  # from the launch of the step collected to its results; overlapped, other work lies in between
    wait_s: float  # of latency_s: nothing to do but wait for results; overlapped and 0: the device waited for the host
    num_queued: int  # requests waiting, paused ones included
    num_running: int
    num_paused: int  # requests that lost their blocks in this step
    num_context_tokens: int  # prompt tokens (and recomputed ones) of this step
    num_generation_tokens: int  # generated tokens that were computed, so that their successors are sampled
    num_live_blocks: int  # KV blocks that running requests hold
    num_cached_blocks: int  # held for reuse only; evicted when needed
    num_free_blocks: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request, known at its end. Tokens of several samples or beams count once per position."""

    arrival_s: float  # time.monotonic() at submission
    queue_s: float | None  # until first scheduled; None: never was
    ttft_s: float | None  # until the first token
    itl_mean_s: float | None  # mean time between tokens; None for fewer than two
    e2e_s: float  # until the terminal state
    num_prompt_tokens: int
    num_output_tokens: int  # over all returned sequences
    num_reused_tokens: int  # prompt tokens found in the prefix cache
    num_pauses: int

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


class StatsBuffer:
    """The last iterations. Appended by the loop's thread, read by any (deque operations are atomic)."""

    def __init__(self, capacity: int = 1000) -> None:
        self._iterations: deque[IterationStats] = deque(maxlen=capacity)

    def append(self, stats: IterationStats) -> None:
        self._iterations.append(stats)

    def snapshot(self) -> list[IterationStats]:
        """Returns the kept iterations, oldest first."""
        while True:
            try:
                return list(self._iterations)
            except RuntimeError:  # the loop appended during the copy
                continue
