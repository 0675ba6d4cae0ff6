"""What the sampler takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamella_executor.sequence import Logprob, RequestState, Sequence


@dataclass(slots=True)
class SampleRow:
    """A request whose live sequences all computed their last token in this step.

    Its logits are the ``len(request.sequences)`` consecutive rows that start at ``first_row`` of the matrix handed to
    `Sampler.sample` (for a prompt whose rows were all kept: the row of its last token).
    """

    request: RequestState
    first_row: int


@dataclass(slots=True)
class NewToken:
    """One continuation: ``parent`` indexes request.sequences; several may share a parent (a fork)."""

    parent: int
    token_id: int
    logprob: float | None = None  # raw model log-probability; None when the request needs none (see needs_logprobs)
    top_logprobs: dict[int, Logprob] | None = None  # when params.logprobs is set; contains the token itself


@dataclass(slots=True)
class SampleResult:
    """How one request goes on.

    ``continuations``, in this order, become the request's live sequences (beams: all parents may change, and a sample
    request forks into ``best_of`` in its first step); the caller appends each with `StopChecker.append`, which also
    says what has ended. ``is_done`` (beam requests only) ends the request: there are no continuations and
    `select_outputs` gives its outputs. ``error`` fails this request only.
    """

    continuations: list[NewToken] = field(default_factory=list)
    hypotheses: list[Sequence] = field(default_factory=list)  # beams that ended in this step; kept in request.beam
    is_done: bool = False
    error: Exception | None = None
