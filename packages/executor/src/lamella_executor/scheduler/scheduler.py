"""Scheduler: packs the tokens of many requests into one step after another.

Decode tokens come first, then chunks of running requests in order of admission, then waiting requests first come, first
served; all within ``max_num_tokens`` rows per step. A capacity policy says who may start and who gives way. A large
step with chunks may leave out a few decode tokens, so that its rows fill whole tiles of the device's matrix products.

A waiting request that does not fit may be overtaken by smaller ones, but only a bounded number of times: then nobody
starts before it does. A paused request is never overtaken. What could never run is refused by `check_fits`.

Steps may be planned while the one before is still being computed: `advance` and `expect` are called at a launch. The
next token of a request may then be a `PENDING_TOKEN`; it counts like any other, and is computed like any other. A
request whose last token is pending has left the running ones (nothing of it is left to plan), but holds its blocks
until `finish`.

With ``num_micro_batches`` above 1 that many steps are in flight, each of other requests (`MicroBatches`): `hold` and
`release` tell which requests wait for results. Those are not planned and never paused. They may be aborted, and their
blocks handed out again at once, while a step in flight still writes to them: whoever gets the blocks is planned later,
and every stage computes steps in the order of their launches, so whatever was written late is written over first.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from lamella_core.errors import RequestError
from lamella_executor.config import CapacitySchedulerPolicy
from lamella_executor.kv_cache.manager import NO_MATCH, KvCacheManager, PrefixMatch
from lamella_executor.scheduler.capacity import CapacityModel
from lamella_executor.scheduler.chunks import num_logits, plan_chunks
from lamella_executor.scheduler.limits import RequestLimits
from lamella_executor.scheduler.microbatch import MicroBatches, Rounds, Steps, is_chunk
from lamella_executor.scheduler.places import Places
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.scheduler.policy import make_policy
from lamella_executor.scheduler.tiles import RowTiles
from lamella_executor.sequence import PENDING_TOKEN, RequestState, Sequence

MAX_BLOCKED = 8  # waiting requests that may be found not to fit before the step stops looking further
OVERTAKES_PER_SLOT = 4  # times max_batch_size: how often a waiting request may be overtaken


@dataclass(slots=True)
class _Step(StepPlan):
    """The plan of one step while it is made."""

    budget: int = 0  # rows left
    num_chunk_tokens: int = 0  # of those, left for chunks of prompts
    is_held_up: bool = False  # the one to be paused waits for results: nobody may take blocks before it is

    def take(self, item: ScheduledSequence) -> None:
        """Adds an item."""
        self.items.append(item)
        self._spend(item, item.num_tokens)

    def drop(self, request: RequestState) -> None:
        """Takes out a request's items."""
        for item in [item for item in self.items if item.request is request]:
            self.items.remove(item)
            self._spend(item, -item.num_tokens)

    def leave_out(self, singles: list[ScheduledSequence]) -> None:
        """Takes out items of one token that are no chunks."""
        left = set(singles)
        self.items = [item for item in self.items if item not in left]
        self.budget += len(left)

    def _spend(self, item: ScheduledSequence, num_tokens: int) -> None:
        self.budget -= num_tokens
        if is_chunk(item):
            self.num_chunk_tokens -= num_tokens


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
        num_micro_batches: steps in flight at most whose requests wait for results, `PipelinedRunner.max_in_flight`.
        row_tile: the device takes as long for any number of rows as for the next multiple of this. A step of prompts
            and decoding requests that is a few rows above a multiple leaves out so many that decode (`RowTiles`);
            not with micro-batches.
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
        num_micro_batches: int = 1,
        row_tile: int = 1,
    ) -> None:
        self._kv = kv
        # A micro-batch takes the oldest that are ready: in the places of those left out, others, and them never again.
        self._tiles = RowTiles(row_tile if num_micro_batches == 1 else 1)
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._limits = RequestLimits(max_batch_size, max_num_tokens, max_beam_width, enable_chunked_prefill)
        self._capacity = CapacityModel(kv, max_batch_size, max_num_tokens, is_chunked=enable_chunked_prefill)
        self._policy = make_policy(policy, self._capacity)
        self._batches = MicroBatches(num_micro_batches)
        self._time = Rounds(self._policy, self._batches) if num_micro_batches > 1 else Steps(self._policy)
        self._requests: dict[int, RequestState] = {}
        self._waiting: OrderedDict[RequestState, int] = OrderedDict()  # -> how often it was overtaken
        self._places = Places(max_batch_size, max_num_tokens, kv.num_state_slots)
        self._running = self._places.running  # in order of admission

    # requests come and go

    @property
    def waiting(self) -> Collection[RequestState]:
        """Requests without blocks, next first."""
        return self._waiting.keys()

    @property
    def running(self) -> Collection[RequestState]:
        """Admitted requests of which something is left to compute, oldest first."""
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
            request: in any state; `advance` skips what is planned for it.
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

        Call `advance` with the plan once it is launched (or computed), before new tokens are appended.
        """
        first = islice(self._waiting, self._places.num_free)
        share = self._batches.share(self._running, first, self._max_num_tokens)
        step = _Step(budget=self._max_num_tokens, num_chunk_tokens=share.num_chunk_tokens)
        self._time.begin(share.ready, self._running)
        self._schedule_running(share.ready, step)
        self._schedule_waiting(step)
        self._trim(step)
        self._time.planned(step.items)
        # Copies wait for a step with a forward pass, which is what carries them out.
        if step.items:
            step.block_copies, step.state_copies = self._kv.take_copies(), self._kv.take_state_copies()
        return step

    def advance(self, plan: StepPlan) -> None:
        """Records that a plan's tokens are computed, or will be before any later plan's.

        Their blocks may be reused where all tokens are known; those behind the window go back.
        """
        kv, running, size = self._kv, self._running, self._kv.tokens_per_block
        for item in plan.items:
            if item.request not in running:
                continue
            sequence, end = item.sequence, item.end
            sequence.num_computed_tokens = end
            if end // size > item.start // size:
                self._commit(item)
            if kv.window is not None:
                kv.evict_window(sequence)

    def expect(self, items: Iterable[ScheduledSequence]) -> None:
        """Appends the `PENDING_TOKEN` of each of these sampled items of a launched plan.

        A request that ends with it at the latest makes room for others.
        """
        for item in items:
            sequence, request = item.sequence, item.request
            sequence.token_ids.append(PENDING_TOKEN)
            if item.end + 1 >= sequence.num_prompt_tokens + request.max_tokens and request in self._running:
                self._places.drain(request)

    def hold(self, plan: StepPlan) -> None:
        """The plan was launched, and others will be before its results are here."""
        self._batches.hold(plan)

    def release(self, plan: StepPlan) -> None:
        """The results of a held plan are here."""
        self._batches.release(plan)

    # parts

    def _commit(self, item: ScheduledSequence) -> None:
        sequence, end = item.sequence, item.end
        if sequence.token_ids[end - 1] == PENDING_TOKEN:
            end -= 1
        if item.request.params.use_beam_search:
            # Beams come and go: what they generate is not offered to others, so all of it is given back with them.
            end = min(end, sequence.num_prompt_tokens)
        self._kv.commit(sequence, item.start, end)

    def _schedule_running(self, ready: list[RequestState], step: _Step) -> None:
        kv, running, items = self._kv, self._running, step.items
        behind: list[RequestState] = []
        for request in ready:
            sequences = request.sequences
            first = sequences[0]
            start = first.num_computed_tokens
            if start != len(first.token_ids) - 1 or (len(sequences) > 1 and _is_behind(sequences)):
                behind.append(request)
            elif step.is_held_up or (step.paused and request not in running):  # paused for an older one
                continue
            elif len(sequences) == 1 and kv.allocate_next(first):
                items.append(ScheduledSequence(request, first, start, 1, 1))
                step.budget -= 1
            elif not self._schedule(request, [(s, 1) for s in sequences], step):
                self._time.delayed(request)
        for request in behind:
            if step.is_held_up:
                return
            if request in running and not self._schedule(request, self._chunks(request, step), step):
                self._time.delayed(request)

    def _schedule_waiting(self, step: _Step) -> None:
        is_shut = step.paused or step.is_held_up or not self._places.num_free
        if not self._waiting or is_shut or not self._opens():
            return
        blocked: list[RequestState] = []
        for request in list(islice(self._waiting, self._max_batch_size + MAX_BLOCKED)):
            if step.budget <= 0 or step.num_chunk_tokens <= 0:
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
        self._policy.close(is_exhausted=step.budget <= 0 or step.num_chunk_tokens <= 0)

    def _opens(self) -> bool:
        return self._policy.open(self._running.keys(), len(self._waiting))

    def _trim(self, step: _Step) -> None:
        """Leaves out of a step with prompts the decoding requests that would cost the device another tile of rows."""
        left = self._tiles.surplus(step.items, self._max_num_tokens - step.budget)
        if left:
            step.leave_out(left)
        for item in left:
            self._time.delayed(item.request)

    def _admit(self, request: RequestState, step: _Step) -> bool:
        """Starts a waiting request if slots, rows, tokens and blocks allow."""
        if not self._places.fit(request):
            return False
        sequence = request.sequences[0]
        if sequence.token_ids[-1] == PENDING_TOKEN:  # paused in the last step; known before the next
            return False
        match = self._match(request, sequence)
        if self._capacity.least_chunk(request) - match.num_tokens > step.budget:
            return False
        if not self._policy.admits(request, match):
            return False
        self._kv.attach(sequence, match)
        if request.first_scheduled_s is None:
            request.first_scheduled_s = time.monotonic()
            request.num_reused_tokens = match.num_tokens
        del self._waiting[request]
        self._places.take(request)
        step.started.append(request)
        is_complete = self._schedule(request, self._chunks(request, step), step)
        self._policy.admitted(request)
        if not is_complete:
            self._time.delayed(request)
        return True

    def _match(self, request: RequestState, sequence: Sequence) -> PrefixMatch:
        # Log-probabilities of prompt tokens need the logits of every prompt position.
        needs_prompt = request.params.prompt_logprobs is not None
        if needs_prompt and len(request.prompt_logprobs) < request.num_prompt_tokens:
            return NO_MATCH
        return self._kv.match_prefix(sequence)

    def _chunks(self, request: RequestState, step: _Step) -> list[tuple[Sequence, int]]:
        if step.budget <= 0 or step.num_chunk_tokens <= 0:
            return []
        limit, is_whole = self._capacity.max_chunk(request), self._capacity.is_whole(request)
        budget = min(step.budget, max(step.num_chunk_tokens, self._capacity.least_chunk(request)))
        return plan_chunks(request, self._kv, budget, limit, is_whole=is_whole)

    def _schedule(self, request: RequestState, chunks: list[tuple[Sequence, int]], step: _Step) -> bool:
        """Plans these tokens of a running request's sequences, all or none of them; returns whether it is sampled."""
        for sequence, num_tokens in chunks:
            while not self._kv.allocate(sequence, sequence.num_computed_tokens + num_tokens):
                victim = self._policy.victim(request, self._running)
                step.is_held_up = victim is not None and self._batches.is_busy(victim)
                if victim is None or step.is_held_up:
                    return False
                self._pause(victim, step)
        is_sampled = False
        for sequence, num_tokens in chunks:
            start = sequence.num_computed_tokens
            logits = num_logits(request, sequence, start, num_tokens)
            item = ScheduledSequence(request, sequence, start, num_tokens, logits)
            step.take(item)
            is_sampled = item.is_sampled
        return is_sampled

    def _pause(self, request: RequestState, step: _Step) -> None:
        """Takes a running request's blocks; it goes to the head of the queue and computes its tokens again."""
        step.drop(request)
        self._leave(request)
        request.num_pauses += 1
        self._waiting[request] = 0
        self._waiting.move_to_end(request, last=False)
        step.paused.append(request)

    def _leave(self, request: RequestState, *, cache: bool = True) -> None:
        """Takes a request out of the running ones, if it is there, and its sequences' blocks."""
        self._places.leave(request)
        self._tiles.forget(request)
        for sequence in request.sequences:
            self._kv.free(sequence, cache=cache)
        self._time.left(request)


def _is_behind(sequences: list[Sequence]) -> bool:
    """Whether some sequence has more than its last token to compute."""
    return any([sequence.num_computed_tokens != len(sequence.token_ids) - 1 for sequence in sequences])
