"""Capacity policies: when a waiting request may start, and who gives way when blocks run out.

Each is one strategy object behind `CapacityPolicy`; the scheduler knows nothing else about them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Reversible

from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.kv_cache.manager import PrefixMatch
from lamella_executor.scheduler.capacity import CapacityModel
from lamella_executor.sequence import RequestState

MAX_OPTIMISTIC_PAUSES = 2  # paused this often, a request resumes only once it can no longer run out of blocks


class CapacityPolicy(ABC):
    """What the scheduler asks while it makes one step; `open` comes first."""

    def __init__(self, capacity: CapacityModel) -> None:
        self.capacity = capacity

    @abstractmethod
    def open(self, running: Collection[RequestState]) -> bool:
        """Begins the admissions of one step; False if nobody may start in it."""

    @abstractmethod
    def admits(self, request: RequestState, match: PrefixMatch) -> bool:
        """May this request start, attaching ``match``? The answer holds until the next change of the cache."""

    def admitted(self, request: RequestState) -> None:  # noqa: B027 (a null default)
        """The request has started: it holds its match and the blocks of its first chunk."""

    def close(self, *, is_exhausted: bool) -> None:  # noqa: B027 (a null default)
        """Ends the admissions of one step; ``is_exhausted``: for want of tokens, not of requests or blocks."""

    def victim(self, request: RequestState, running: Reversible[RequestState]) -> RequestState | None:
        """Returns who must give its blocks to a running ``request`` that is short; None: it sits the step out."""
        return None


class GuaranteedNoEvict(CapacityPolicy):
    """Admits a request only if it and all running ones fit at their worst: nobody is ever paused."""

    def __init__(self, capacity: CapacityModel) -> None:
        super().__init__(capacity)
        self._reserved = 0  # blocks that the running may still take; with a window, may hold

    def open(self, running: Collection[RequestState]) -> bool:
        self._reserved = self._reserve(running)
        return True

    def admits(self, request: RequestState, match: PrefixMatch) -> bool:
        kv = self.capacity.kv
        worst = self.capacity.worst_case(request)
        if kv.window is not None:
            return self._reserved + worst <= kv.num_blocks
        return self._reserved + worst - match.num_held <= kv.num_available - match.num_idle

    def admitted(self, request: RequestState) -> None:
        self._reserved += self._reserve((request,))

    def _reserve(self, requests: Collection[RequestState]) -> int:
        if self.capacity.kv.window is not None:
            return sum(map(self.capacity.worst_case, requests))
        return self.capacity.outstanding(requests)


class StaticBatch(GuaranteedNoEvict):
    """Fills a batch, over several steps if its prompts need them, and starts no other until all of it has ended."""

    def __init__(self, capacity: CapacityModel) -> None:
        super().__init__(capacity)
        self._is_open = False
        self._num_running = 0

    def open(self, running: Collection[RequestState]) -> bool:
        # A member that has ended closes the batch: its place is not refilled.
        self._is_open = not running or (self._is_open and len(running) >= self._num_running)
        self._num_running = len(running)
        return self._is_open and super().open(running)

    def admitted(self, request: RequestState) -> None:
        super().admitted(request)
        self._num_running += 1

    def close(self, *, is_exhausted: bool) -> None:
        self._is_open = self._is_open and is_exhausted


class MaxUtilization(CapacityPolicy):
    """Admits a request as soon as its present tokens fit; when blocks run out, the newest gives way.

    The oldest running request always proceeds, so everything ends. A request paused `MAX_OPTIMISTIC_PAUSES` times
    resumes under GUARANTEED_NO_EVICT's condition; as only newer ones than it are paused for older ones, that was its
    last pause.
    """

    def __init__(self, capacity: CapacityModel) -> None:
        super().__init__(capacity)
        self._guaranteed = GuaranteedNoEvict(capacity)
        self._running: Collection[RequestState] = ()

    def open(self, running: Collection[RequestState]) -> bool:
        self._running = running
        return True

    def admits(self, request: RequestState, match: PrefixMatch) -> bool:
        if request.num_pauses >= MAX_OPTIMISTIC_PAUSES:
            self._guaranteed.open(self._running)
            return self._guaranteed.admits(request, match)
        present, held = self.capacity.present, self.capacity.held
        available = self.capacity.kv.num_available - match.num_idle
        needed = present(request) - match.num_held
        if needed > available - len(self._running):  # a block of headroom for each running request
            return False
        return needed + sum(max(1, present(r) - held(r)) for r in self._running) <= available

    def victim(self, request: RequestState, running: Reversible[RequestState]) -> RequestState | None:
        newest = next(reversed(running))
        return None if newest is request else newest


_POLICIES: dict[CapacitySchedulerPolicy, type[CapacityPolicy]] = {
    CapacitySchedulerPolicy.GUARANTEED_NO_EVICT: GuaranteedNoEvict,
    CapacitySchedulerPolicy.MAX_UTILIZATION: MaxUtilization,
    CapacitySchedulerPolicy.STATIC_BATCH: StaticBatch,
}


def make_policy(policy: CapacitySchedulerPolicy, capacity: CapacityModel) -> CapacityPolicy:
    """Returns a fresh strategy object for one scheduler."""
    return _POLICIES[policy](capacity)
