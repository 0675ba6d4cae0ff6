"""StepPlan: what one step computes; made by the scheduler, read by the runner and the loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamella_executor.sequence import RequestState, Sequence


class ScheduledSequence:
    """Tokens [start, end) of one sequence go through the model in this step.

    Made once per token, so it is a plain class. Nothing of it changes afterwards.
    """

    __slots__ = ("end", "is_sampled", "num_logits", "num_tokens", "request", "sequence", "start")

    def __init__(self, request: RequestState, sequence: Sequence, start: int, num_tokens: int, num_logits: int) -> None:
        """Records what is planned.

        Args:
            request: whose tokens these are.
            sequence: one of its live ones.
            start: ``sequence.num_computed_tokens``.
            num_tokens: rows of the step.
            num_logits: last rows whose logits are needed: 0, 1, or num_tokens (prompt log-probabilities).
        """
        self.request = request
        self.sequence = sequence
        self.start = start
        self.num_tokens = num_tokens
        self.num_logits = num_logits
        self.end = end = start + num_tokens
        # The step computes the last token that the sequence has, so its next one, at position `end`, is sampled.
        self.is_sampled = end == len(sequence.token_ids)


@dataclass(slots=True)
class StepPlan:
    """Packed work of one step, in row order; rows of logits follow the same order.

    Single next tokens of running requests come before chunks of several.
    """

    items: list[ScheduledSequence] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination), before the forward
    state_copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination) slots, likewise, in order
    started: list[RequestState] = field(default_factory=list)  # got their first blocks in this step, or new ones
    paused: list[RequestState] = field(default_factory=list)  # lost their blocks in this step; back in the queue

    @property
    def num_tokens(self) -> int:
        return sum([item.num_tokens for item in self.items])

    @property
    def num_logits(self) -> int:
        return sum([item.num_logits for item in self.items])
