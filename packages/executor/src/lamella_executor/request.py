"""What a user sees of a request: its status, its outputs, and the update by which the engine loop reports them.

State machine of a request (the loop's thread makes every transition; exactly one terminal state is reached)::

    QUEUED ---> RUNNING <---> PAUSED
       |           |             |
       +-----------+-------------+--> FINISHED | CANCELLED | FAILED

QUEUED: accepted, no token computed. RUNNING: has blocks of the KV cache. PAUSED: lost them under memory pressure and
will be recomputed. FINISHED: complete. CANCELLED: aborted; what was generated so far is kept. FAILED: `error` says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamella_executor.sequence import Logprob
    from lamella_executor.stats import RequestMetrics


class RequestStatus(str, Enum):
    """Where a request is in the state machine of this module."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL

    def may_become(self, new: RequestStatus) -> bool:
        """Whether the state machine has an edge from this status to ``new``."""
        return new in _EDGES[self]


_TERMINAL = frozenset({RequestStatus.FINISHED, RequestStatus.CANCELLED, RequestStatus.FAILED})
_EDGES: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.QUEUED: _TERMINAL | {RequestStatus.RUNNING},
    RequestStatus.RUNNING: _TERMINAL | {RequestStatus.PAUSED},
    RequestStatus.PAUSED: _TERMINAL | {RequestStatus.RUNNING},
    **{status: frozenset() for status in _TERMINAL},
}


@dataclass(frozen=True)
class CompletionOutput:
    """One sample or beam of a request, as of one moment; cumulative since the prompt.

    The ``*_diff`` properties hold what is new since the result's previous yield. Beam search may rewrite what it showed
    before, so there the cumulative fields are the ones to read.
    """

    index: int  # 0..n-1
    text: str = ""  # "" when no decoder was given
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # one per token, when asked for
    finish_reason: str | None = None  # None while it runs; "stop" | "length" | "cancelled"
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it
    shown: tuple[int, int] = field(default=(0, 0), repr=False, compare=False)  # characters, tokens of the last yield

    @property
    def length(self) -> int:
        """Generated tokens."""
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return self.text[self.shown[0] :]

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self.shown[1] :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]] | None:
        return self.logprobs[self.shown[1] :] if self.logprobs is not None else None

    def after(self, previous: CompletionOutput | None) -> CompletionOutput:
        """Returns the same output with its differences taken against ``previous``."""
        return self if previous is None else replace(self, shown=(len(previous.text), len(previous.token_ids)))


@dataclass(frozen=True)
class RequestUpdate:
    """What the loop tells a result: a status, and the outputs if they are new."""

    status: RequestStatus
    outputs: list[CompletionOutput] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: Exception | None = None
    metrics: RequestMetrics | None = None
