"""Scheduler: packs the tokens of many requests into one step after another.

Decode tokens come first, then chunks of running requests in order of admission, then waiting requests first come, first
served; all within ``max_num_tokens`` rows per step. A capacity policy says who may start and who gives way.

A waiting request that does not fit may be overtaken by smaller ones, but only a bounded number of times: then nobody
starts before it does. A paused request is never overtaken. What could never run is refused by `check_fits`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice

from lamella_core.errors import RequestError
from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.kv_cache.manager import NO_MATCH, KvCacheManager, PrefixMatch
from lamella_executor.scheduler.capacity import CapacityModel
from lamella_executor.scheduler.chunks import num_logits, plan_chunks
from lamella_executor.scheduler.limits import RequestLimits
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.scheduler.policy import make_policy
from lamella_executor.sequence import RequestState, Sequence

MAX_BLOCKED = 8  # waiting requests that may be found not to fit before the step stops looking further
OVERTAKES_PER_SLOT = 4  # times max_batch_size: how often a waiting request may be overtaken


@dataclass(slots=True)
class _Step:
    """The plan of one step while it is made."""

    budget: int  # rows left
    work: dict[RequestState, list[ScheduledSequence]] = field(default_factory=dict)  # in row order
    paused: list[RequestState] = field(default_factory=list)


class Scheduler:
    """Decides what each step computes. Owned by the loop's thread, like the KV cache manager it drives.

    Args:
        kv: the block tables of all sequences.
        max_batch_size: `RequestState.slots` of all running requests at most.
        max_num_tokens: rows of one step at most.
        policy: when requests start and who gives way.
        enable_chunked_prefill: False: a prompt is computed in one step. (What a paused request recomputes may be longer
            than a step and is chunked all the same.)
        max_beam_width: width of a beam request at most.
    """

    def __init__(
        self,
        kv: KvCacheManager,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
        enable_chunked_prefill: bool = True,
        max_beam_width: int = 1,
    ) -> None:
        self._kv = kv
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._limits = RequestLimits(max_batch_size, max_num_tokens, max_beam_width, enable_chunked_prefill)
        self._capacity = CapacityModel(kv, max_num_tokens, is_chunked=enable_chunked_prefill)
        self._policy = make_policy(policy, self._capacity)
        self._requests: dict[int, RequestState] = {}
        self._waiting: OrderedDict[RequestState, int] = OrderedDict()  # -> how often it was overtaken
        self._running: dict[RequestState, None] = {}  # in order of admission
        self._num_slots = 0  # of max_batch_size, taken by running requests
        self._num_rows = 0  # sum of the running requests' widths: what a step of decode tokens may need

    # requests come and go

    @property
    def waiting(self) -> Collection[RequestState]:
        """Requests without blocks, next first."""
        return self._waiting.keys()

    @property
    def running(self) -> Collection[RequestState]:
        """Admitted requests, oldest first."""
        return self._running.keys()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def check_fits(self, request: RequestState) -> None:
        """Refuses a request that could never run here; safe to call from any thread.

        Raises:
            RequestError: the message holds the numbers and the knob.
        """
        self._limits.check(request, self._capacity)

    def add(self, request: RequestState) -> None:
        """Queues a request.

        Raises:
            RequestError: it could never run here, or its id is in use.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id} is already in use")
        self.check_fits(request)
        self._requests[request.request_id] = request
        self._waiting[request] = 0

    def finish(self, request: RequestState, *, cache: bool = True) -> None:
        """Takes a request out and gives back all its blocks; harmless when repeated.

        Args:
            request: waiting or running; `advance` skips what is planned for it.
            cache: False after a failed step: nobody will reuse its blocks.
        """
        if self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
        self._waiting.pop(request, None)
        self._leave(request, cache=cache)
        for sequence in request.finished:
            self._kv.free(sequence, cache=cache)

    def abort(self, request_id: int) -> RequestState | None:
        """Takes out the request with this id and returns it; None if there is none."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request)
        return request

    # one step

    def schedule(self) -> StepPlan:
        """Plans one step: budget, then running requests, then waiting ones.

        Call `advance` with the plan once its forward pass is done, before new tokens are appended.
        """
        step = _Step(budget=self._max_num_tokens)
        self._schedule_running(step)
        self._schedule_waiting(step)
        items = [item for work in step.work.values() for item in work]
        # Copies wait for a step with a forward pass, which is what carries them out.
        return StepPlan(items, self._kv.take_copies() if items else [], step.paused)

    def advance(self, plan: StepPlan) -> None:
        """Records that a plan's tokens are computed: their blocks may be reused, those behind the window go back."""
        kv, running = self._kv, self._running
        for item in plan.items:
            request, sequence = item.request, item.sequence
            if request not in running:
                continue
            sequence.num_computed_tokens = item.end
            # Beams come and go: what they generate is not offered to others, so all of it is given back with them.
            kv.commit(sequence, item.start, request.num_prompt_tokens if request.params.use_beam_search else None)
            kv.evict_window(sequence)

    # parts

    def _schedule_running(self, step: _Step) -> None:
        behind: list[RequestState] = []
        for request in list(self._running):
            sequences = request.sequences
            if any([s.num_computed_tokens != len(s.token_ids) - 1 for s in sequences]):
                behind.append(request)
            elif request in self._running:  # not paused for an older one meanwhile
                self._schedule(request, [(s, 1) for s in sequences], step)
        for request in behind:
            if request in self._running and step.budget > 0:
                self._schedule(request, self._chunks(request, step), step)

    def _schedule_waiting(self, step: _Step) -> None:
        is_full = self._num_slots >= self._max_batch_size or self._num_rows >= self._max_num_tokens
        if not self._waiting or step.paused or is_full or not self._policy.open(self._running.keys()):
            return
        blocked: list[RequestState] = []
        for request in list(islice(self._waiting, self._max_batch_size + MAX_BLOCKED)):
            if step.budget <= 0:
                break
            if self._admit(request, step):
                for overtaken in blocked:
                    self._waiting[overtaken] += 1
                continue
            blocked.append(request)
            num_overtakes = self._waiting[request]
            is_patient = num_overtakes < OVERTAKES_PER_SLOT * self._max_batch_size and not request.num_pauses
            if not is_patient or len(blocked) >= MAX_BLOCKED:
                break
        self._policy.close(is_exhausted=step.budget <= 0)

    def _admit(self, request: RequestState, step: _Step) -> bool:
        """Starts a waiting request if slots, rows, tokens and blocks allow."""
        if self._num_slots + request.slots > self._max_batch_size:
            return False
        if self._num_rows + request.width > self._max_num_tokens:
            return False
        sequence = request.sequences[0]
        match = self._match(request, sequence)
        is_too_long = sequence.num_tokens - match.num_tokens > step.budget
        if (is_too_long and self._capacity.is_whole(request)) or not self._policy.admits(request, match):
            return False
        self._kv.attach(sequence, match)
        if request.first_scheduled_s is None:
            request.first_scheduled_s = time.monotonic()
            request.num_reused_tokens = match.num_tokens
        del self._waiting[request]
        self._running[request] = None
        self._num_slots += request.slots
        self._num_rows += request.width
        self._schedule(request, self._chunks(request, step), step)
        self._policy.admitted(request)
        return True

    def _match(self, request: RequestState, sequence: Sequence) -> PrefixMatch:
        # Log-probabilities of prompt tokens need the logits of every prompt position.
        needs_prompt = request.params.prompt_logprobs is not None
        if needs_prompt and len(request.prompt_logprobs) < request.num_prompt_tokens:
            return NO_MATCH
        return self._kv.match_prefix(sequence)

    def _chunks(self, request: RequestState, step: _Step) -> list[tuple[Sequence, int]]:
        limit, is_whole = self._capacity.max_chunk(request), self._capacity.is_whole(request)
        return plan_chunks(request, self._kv, step.budget, limit, is_whole=is_whole)

    def _schedule(self, request: RequestState, chunks: list[tuple[Sequence, int]], step: _Step) -> None:
        """Plans these tokens of a running request's sequences, all or none of them."""
        for sequence, num_tokens in chunks:
            while not self._kv.allocate(sequence, sequence.num_computed_tokens + num_tokens):
                victim = self._policy.victim(request, self._running.keys())
                if victim is None:
                    return
                self._pause(victim, step)
        items = []
        for sequence, num_tokens in chunks:
            start = sequence.num_computed_tokens
            logits = num_logits(request, sequence, start, num_tokens)
            items.append(ScheduledSequence(request, sequence, start, num_tokens, logits))
            step.budget -= num_tokens
        if items:
            step.work[request] = items

    def _pause(self, request: RequestState, step: _Step) -> None:
        """Takes a running request's blocks; it goes to the head of the queue and computes its tokens again."""
        step.budget += sum(item.num_tokens for item in step.work.pop(request, ()))
        self._leave(request)
        request.num_pauses += 1
        self._waiting[request] = 0
        self._waiting.move_to_end(request, last=False)
        step.paused.append(request)

    def _leave(self, request: RequestState, *, cache: bool = True) -> None:
        """Takes a request out of the running ones, if it is there, and its sequences' blocks."""
        if request in self._running:
            del self._running[request]
            self._num_slots -= request.slots
            self._num_rows -= request.width
        for sequence in request.sequences:
            self._kv.free(sequence, cache=cache)
