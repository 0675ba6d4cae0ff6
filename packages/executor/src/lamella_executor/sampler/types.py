"""What the sampler takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lamella_executor.sequence import Logprob, RequestState, Sequence


@dataclass(slots=True)
class SampleRow:
    """A request whose live sequences all computed their last token in this step."""

    request: RequestState
    logits: (
        torch.Tensor
    )  # [len(request.sequences), vocab_size] float32, rows in the order of request.sequences; scratch


@dataclass(slots=True)
class NewToken:
    """One continuation: ``parent`` indexes request.sequences; several may share a parent (a fork)."""

    parent: int
    token_id: int
    logprob: float  # of the token under the distribution it was drawn from
    top_logprobs: dict[int, Logprob] | None = None  # when asked for; contains the token itself


@dataclass(slots=True)
class SampleResult:
    """How one request goes on.

    ``continuations`` in index order become the request's live sequences (beams: all parents may change).
    ``hypotheses`` are beams that ended in this step. ``is_done`` ends a beam request: `RequestState.beam` then holds the
    finished hypotheses. ``error`` fails the request only.
    """

    continuations: list[NewToken] = field(default_factory=list)
    hypotheses: list[Sequence] = field(default_factory=list)
    is_done: bool = False
    error: Exception | None = None
