"""StepPlan: what one step computes; made by the scheduler, read by the runner and the loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamella_executor.sequence import RequestState, Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens [start, start + num_tokens) of one sequence go through the model in this step."""

    request: RequestState
    sequence: Sequence
    start: int  # equals sequence.num_computed_tokens when planned
    num_tokens: int
    num_logits: int  # last rows whose logits are needed: 0, 1, or num_tokens (prompt log-probabilities)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_sampled(self) -> bool:
        """The step computes the sequence's last token, so its next one is sampled."""
        return self.end == self.sequence.num_tokens


@dataclass(slots=True)
class StepPlan:
    """Packed work of one step, in row order; rows of logits follow the same order."""

    items: list[ScheduledSequence] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination), before the forward
    paused: list[RequestState] = field(default_factory=list)  # lost their blocks in this step; back in the queue

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_logits(self) -> int:
        return sum(item.num_logits for item in self.items)
