"""Capacity policies: when a waiting request may start, and who gives way when blocks run out.

Each is one strategy object behind `CapacityPolicy`; the scheduler knows nothing else about them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.kv_cache.manager import PrefixMatch
from lamella_executor.scheduler.capacity import CapacityModel
from lamella_executor.scheduler.forecast import BlockForecast, Levels
from lamella_executor.sequence import RequestState

MAX_OPTIMISTIC_PAUSES = 2  # paused this often, a request resumes only once it can no longer run out of blocks
SHORT_FRACTION = 8  # of the running: how many may sit a step out for want of blocks before one is paused
CROWD = 1.25  # times what the cache holds of requests at their longest: how many could run while starts are spread
PROMPT_FRACTION = 4  # of a step's tokens: how many may be of prompts on average while starts are spread
GROUP_TOKENS = 2048  # prompt tokens of requests of known length that start together at most
GROUP_FRACTION = 40  # of the requests that run side by side on average: how many of those there are at most

Running = dict[RequestState, None]  # oldest first


class CapacityPolicy(ABC):
    """What the scheduler asks while it makes one step; `open` comes first."""

    def __init__(self, capacity: CapacityModel) -> None:
        self.capacity = capacity

    def begin(self) -> None:  # noqa: B027 (a null default)
        """A step is about to be planned."""

    @abstractmethod
    def open(self, running: Collection[RequestState], num_waiting: int) -> bool:
        """Begins the admissions of one step; False if nobody may start in it."""

    @abstractmethod
    def admits(self, request: RequestState, match: PrefixMatch) -> bool:
        """May this request start, attaching ``match``? The answer holds until the next change of the cache."""

    def admitted(self, request: RequestState) -> None:  # noqa: B027 (a null default)
        """The request has started: it holds its match and the blocks of its first chunk."""

    def delayed(self, request: RequestState) -> None:  # noqa: B027 (a null default)
        """A running request does not get its next token in this step."""

    def left(self, request: RequestState) -> None:  # noqa: B027 (a null default)
        """A request, maybe a waiting one, has given back all its blocks."""

    def close(self, *, is_exhausted: bool) -> None:  # noqa: B027 (a null default)
        """Ends the admissions of one step; ``is_exhausted``: for want of tokens, not of requests or blocks."""

    def victim(self, request: RequestState, running: Running) -> RequestState | None:
        """Returns who must give its blocks to a running ``request`` that is short; None: it sits the step out."""
        return None


class GuaranteedNoEvict(CapacityPolicy):
    """Admits a request only if it and all running ones fit at their worst: nobody is ever paused."""

    def __init__(self, capacity: CapacityModel) -> None:
        super().__init__(capacity)
        self._reserved = 0  # blocks that the running may still take; with a window, may hold

    def open(self, running: Collection[RequestState], num_waiting: int) -> bool:
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

    def open(self, running: Collection[RequestState], num_waiting: int) -> bool:
        # A member that has ended closes the batch: its place is not refilled.
        self._is_open = not running or (self._is_open and len(running) >= self._num_running)
        self._num_running = len(running)
        return self._is_open and super().open(running, num_waiting)

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
        self._needed: int | None = None  # blocks that the running need for their next tokens; None: not counted yet

    def open(self, running: Collection[RequestState], num_waiting: int) -> bool:
        self._running = running
        self._needed = None
        return True

    def admits(self, request: RequestState, match: PrefixMatch) -> bool:
        if request.num_pauses >= MAX_OPTIMISTIC_PAUSES:
            return self._is_guaranteed(request, match)
        available = self.capacity.kv.num_available - match.num_idle
        needed = self.capacity.present(request) - match.num_held
        if needed > available - len(self._running):  # a block of headroom for each running request
            return False
        if self._needed is None:
            self._needed = sum(map(self._next_need, self._running))
        return needed + self._needed <= available

    def admitted(self, request: RequestState) -> None:
        if self._needed is not None:
            self._needed += self._next_need(request)

    def victim(self, request: RequestState, running: Running) -> RequestState | None:
        newest = next(reversed(running))
        return None if newest is request else newest

    def _is_guaranteed(self, request: RequestState, match: PrefixMatch) -> bool:
        self._guaranteed.open(self._running, 0)
        return self._guaranteed.admits(request, match)

    def _next_need(self, request: RequestState) -> int:
        return max(1, self.capacity.present(request) - self.capacity.held(request))


class PredictedPeak(MaxUtilization):
    """Admits a request if, by the forecast, all that run with it never need more blocks than there are.

    Requests that wait for others to end need not fit beside them at their longest, so more run than under
    GUARANTEED_NO_EVICT, and as long as the forecast holds none is paused. It can fail when prompts take longer to
    compute than foreseen or shared blocks outlive whom they were counted for. A shortage of a few blocks passes with
    the next request that ends, so those short of blocks sit the step out; when more than one in `SHORT_FRACTION` are,
    or the oldest is, the newest gives way as in MAX_UTILIZATION.

    Requests that start together are at their longest together, and few then fit. So while many more wait, for whom a
    batch has room, than the cache could hold, requests whose length is known start at the rate at which the cache can
    take them on average (`_Pace`), beside others that are half done. Not if their prompts alone keep the device busy.
    """

    def __init__(self, capacity: CapacityModel) -> None:
        super().__init__(capacity)
        self._forecast = BlockForecast(capacity.kv.tokens_per_block)
        self._pace = _Pace(capacity.kv.num_blocks)
        self._levels: Levels | None = None  # of the request that was last asked about
        self._num_waiting = 0
        self._num_short = 0  # requests that found too few blocks in this step

    def begin(self) -> None:
        self._forecast.tick()
        self._pace.tick()
        self._num_short = 0

    def open(self, running: Collection[RequestState], num_waiting: int) -> bool:
        self._num_waiting = num_waiting
        return super().open(running, num_waiting) and not self._num_short

    def admits(self, request: RequestState, match: PrefixMatch) -> bool:
        kv = self.capacity.kv
        self._levels = levels = self._foresee(request, match)
        if request.num_pauses >= MAX_OPTIMISTIC_PAUSES and not self._is_guaranteed(request, match):
            return False
        unforeseen = max(0, kv.num_live - self._forecast.present)
        if self._forecast.peak_with(levels) + unforeseen > kv.num_blocks:
            return False
        num_tokens = request.sequences[0].num_tokens - match.num_tokens
        if not self._running or not _has_known_length(request) or not self._is_crowded(request, levels, num_tokens):
            return True
        return self._pace.allows(levels, num_tokens)

    def admitted(self, request: RequestState) -> None:
        if self._levels is not None:
            self._forecast.add(request, self._levels)
            self._pace.spend(self._levels)

    def delayed(self, request: RequestState) -> None:
        self._forecast.delay(request)

    def left(self, request: RequestState) -> None:
        self._forecast.remove(request)

    def victim(self, request: RequestState, running: Running) -> RequestState | None:
        self._num_short += 1
        is_oldest = next(iter(running)) is request
        if not is_oldest and self._num_short * SHORT_FRACTION <= len(running):
            return None
        return super().victim(request, running)

    def _is_crowded(self, request: RequestState, levels: Levels, num_tokens: int) -> bool:
        """Whether more requests like this one could run than the cache holds, with time left beside their prompts.

        ``num_tokens`` are those that it computes first.
        """
        capacity, num_blocks = self.capacity, self.capacity.kv.num_blocks
        crowd = min(self._num_waiting, capacity.max_batch_size // request.slots)
        if crowd * int(levels[-1]) <= CROWD * num_blocks:
            return False
        starts_per_step = num_blocks / int(levels.sum())  # that the cache can take on average
        return starts_per_step * num_tokens * PROMPT_FRACTION <= capacity.max_num_tokens

    def _foresee(self, request: RequestState, match: PrefixMatch) -> Levels:
        sequences, window = request.sequences, self.capacity.kv.window
        num_steps = max(1, request.max_tokens - sequences[0].num_output_tokens)
        if window is None and len(sequences) == 1 and request.width == 1:
            num_shared = match.num_held - match.num_idle
            return self._forecast.growing(sequences[0].num_tokens, num_steps, num_shared)
        return self._forecast.constant(self.capacity.worst_case(request), num_steps)


class _Pace:
    """Spreads starts in time: a request costs its blocks times its steps, of which each step brings ``num_blocks``.

    Nothing is saved up at first, so that the first requests start as far apart as all others: what starts together ends
    together, and leaves the cache half empty again and again. Only so much is saved as requests of `GROUP_TOKENS` cost:
    a step with few prompt tokens may take the host longer to launch than the device to compute.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._saved = 0  # blocks times steps
        self._is_open = False  # a group is starting

    def tick(self) -> None:
        self._saved += self._num_blocks

    def allows(self, levels: Levels, num_tokens: int) -> bool:
        """May a request with these levels, which computes ``num_tokens`` first, start now?"""
        cost = int(levels.sum())
        most = self._num_blocks * len(levels) // GROUP_FRACTION
        group = max(cost, min(cost * (GROUP_TOKENS // num_tokens), most))
        self._saved = min(self._saved, group + self._num_blocks)
        self._is_open = self._saved >= (cost if self._is_open else group)
        return self._is_open

    def spend(self, levels: Levels) -> None:
        self._saved = max(0, self._saved - int(levels.sum()))


def _has_known_length(request: RequestState) -> bool:
    """Whether nothing but max_tokens ends the request."""
    params = request.params
    return request.end_id is None and not (request.extra_end_ids or params.stop_ids or params.stop_strings)


_POLICIES: dict[CapacitySchedulerPolicy, type[CapacityPolicy]] = {
    CapacitySchedulerPolicy.GUARANTEED_NO_EVICT: GuaranteedNoEvict,
    CapacitySchedulerPolicy.MAX_UTILIZATION: MaxUtilization,
    CapacitySchedulerPolicy.PREDICTED_PEAK: PredictedPeak,
    CapacitySchedulerPolicy.STATIC_BATCH: StaticBatch,
}


def make_policy(policy: CapacitySchedulerPolicy, capacity: CapacityModel) -> CapacityPolicy:
    """Returns a fresh strategy object for one scheduler."""
    return _POLICIES[policy](capacity)
