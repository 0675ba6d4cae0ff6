"""Micro-batches: requests in flight, an even share of the work for each step, and a policy's time in rounds.

A pipeline of stages is busy while as many steps are in flight as it has stages. A request whose results are still to
come is in none of the others, so what can be computed is spread over the steps: each takes its share of the decoding
sequences and of the tokens of prompts. A chunk of a prompt without results keeps nobody waiting: the next chunk may
follow it into the pipeline, where every stage computes it later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.scheduler.policy import CapacityPolicy
from lamella_executor.sequence import RequestState

LEAST_CHUNK = 128  # tokens; a step of fewer takes as long, for its time is that of reading the weights


@dataclass(frozen=True, slots=True)
class Share:
    """What the next step may take."""

    ready: list[RequestState]  # running requests, oldest first
    num_chunk_tokens: int  # of prompts, and of what paused requests compute again


class MicroBatches:
    """Which requests wait for results, and what of the others goes into the next step.

    Args:
        count: steps in flight at most; 1: nothing is ever held back.
        least_chunk: tokens below which prompts are not spread any further.
    """

    def __init__(self, count: int, least_chunk: int = LEAST_CHUNK) -> None:
        self._count = count
        self._least_chunk = least_chunk
        self._busy: set[RequestState] = set()  # each in one step; results of it are in flight
        self._num_rows = 0  # sampled ones in flight
        self._num_chunk_tokens = 0  # in flight

    def is_busy(self, request: RequestState) -> bool:
        """Whether results of the request are in flight; it is not planned, and keeps its blocks unless it ends."""
        return request in self._busy

    @property
    def is_idle(self) -> bool:
        """Whether no request waits for results."""
        return not self._busy

    def hold(self, plan: StepPlan) -> None:
        """The plan was launched."""
        self._busy.update([item.request for item in plan.items if item.num_logits])
        self._count_in_flight(plan, 1)

    def release(self, plan: StepPlan) -> None:
        """The results of a held plan are here."""
        self._busy.difference_update([item.request for item in plan.items if item.num_logits])
        self._count_in_flight(plan, -1)

    def share(self, running: Collection[RequestState], waiting: Iterable[RequestState], most: int) -> Share:
        """Returns what of the running requests the next step may take, and how much of prompts.

        Args:
            running: oldest first.
            waiting: those that may start.
            most: rows of a step.
        """
        if self._count == 1 and not self._busy:
            return Share(list(running), most)
        num_rows, num_missing = self._num_rows, self._num_chunk_tokens
        rows = {request: _num_rows(request) for request in running if request not in self._busy}
        for request, num in rows.items():
            num_rows += num
            num_missing += 0 if num else _num_missing(request)
        for request in waiting:
            if num_missing >= most * self._count:
                break
            num_missing += _num_missing(request)
        rows_left = -(-num_rows // self._count)
        ready: list[RequestState] = []
        for request, num in rows.items():
            if not num or rows_left > 0:
                ready.append(request)
                rows_left -= num
        return Share(ready, min(most, max(self._least_chunk, -(-num_missing // self._count))))

    def _count_in_flight(self, plan: StepPlan, sign: int) -> None:
        self._num_rows += sign * sum([item.is_sampled for item in plan.items])
        self._num_chunk_tokens += sign * sum([item.num_tokens for item in plan.items if is_chunk(item)])


class Steps:
    """Tells a policy what happens to time: with every step the running requests get a token each."""

    def __init__(self, policy: CapacityPolicy) -> None:
        self._policy = policy

    def begin(self, ready: Iterable[RequestState], running: Iterable[RequestState]) -> None:
        """A step is about to be planned, in which the ``ready`` ones of the running requests may take part."""
        self._policy.begin()

    def delayed(self, request: RequestState) -> None:
        """A running request does not get its token in this step."""
        self._policy.delayed(request)

    def planned(self, items: Iterable[ScheduledSequence]) -> None:
        """These items make up the step."""

    def left(self, request: RequestState) -> None:
        """A request, maybe a waiting one, has given back all its blocks."""
        self._policy.left(request)


class Rounds(Steps):
    """The time of micro-batches: in a round of steps, not in each, the running requests get a token each.

    A round ends when one of its requests can be planned again, or when nothing is in flight.
    """

    def __init__(self, policy: CapacityPolicy, batches: MicroBatches) -> None:
        super().__init__(policy)
        self._batches = batches
        self._sampled: set[RequestState] = set()  # in this round

    def begin(self, ready: Iterable[RequestState], running: Iterable[RequestState]) -> None:
        if not self._batches.is_idle and self._sampled.isdisjoint(ready):
            return
        for request in running:
            if request not in self._sampled:
                self._policy.delayed(request)
        self._sampled.clear()
        self._policy.begin()

    def delayed(self, request: RequestState) -> None:
        """Its token may still come in this round."""

    def planned(self, items: Iterable[ScheduledSequence]) -> None:
        self._sampled.update([item.request for item in items if item.is_sampled])

    def left(self, request: RequestState) -> None:
        self._sampled.discard(request)
        super().left(request)


def is_chunk(item: ScheduledSequence) -> bool:
    """Whether an item is more than the next token of a sequence that decodes."""
    return item.num_tokens > 1 or not item.is_sampled


def _num_rows(request: RequestState) -> int:
    """Returns the request's sequences if none has more than its last token to compute, else 0."""
    sequences = request.sequences
    for sequence in sequences:
        if len(sequence.token_ids) - sequence.num_computed_tokens > 1:
            return 0
    return len(sequences)


def _num_missing(request: RequestState) -> int:
    """Returns the tokens that the request's sequences have still to compute."""
    return sum([len(sequence.token_ids) - sequence.num_computed_tokens for sequence in request.sequences])
