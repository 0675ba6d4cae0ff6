"""Requests for the sampler, and a cache-less loop that drives it with any function from token ids to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lamella_executor.sampler import Sampler, SampleResult, SampleRow, StopChecker, select_outputs
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.sequence import RequestState, Sequence

LogitsFn = Callable[[list[list[int]]], torch.Tensor]  # n sequences -> [n, vocab_size] float32


class TableDecoder:
    """TextDecoder over a table token -> text; "<half>" texts are held back until the next token, as half characters."""

    def __init__(self, table: dict[int, str]) -> None:
        self.table, self.text, self.held = table, "", ""
        self.pushed: list[int] = []

    def push(self, token_id: int) -> None:
        self.pushed.append(token_id)
        piece = self.table[token_id]
        if piece == "<half>":
            self.held += "\N{REPLACEMENT CHARACTER}"
            return
        self.text += piece
        self.held = ""

    def finish(self) -> None:
        self.text += self.held
        self.held = ""

    def fork(self) -> TableDecoder:
        copy = TableDecoder(self.table)
        copy.text, copy.held, copy.pushed = self.text, self.held, list(self.pushed)
        return copy


def make_request(prompt: list[int] | None = None, *, request_id: int = 0, **options: Any) -> RequestState:
    """Makes a request as admission would; ``options`` are RequestState's own or SamplingParams'."""
    prompt = [1] if prompt is None else prompt
    own = {name: options.pop(name) for name in ("end_id", "extra_end_ids", "bad_words_ids") if name in options}
    decoder = options.pop("decoder", None)
    params = SamplingParams(**options)
    return RequestState(
        request_id=request_id,
        params=params,
        seed=params.seed or 0,
        end_id=own.pop("end_id", None),
        max_tokens=params.max_tokens,
        sequences=[Sequence(0, list(prompt), len(prompt), decoder=decoder)],
        arrival_s=0.0,
        **own,
    )


def advance(request: RequestState, result: SampleResult) -> None:
    """Applies one result to its request, as the engine loop does."""
    if result.error is not None:
        raise result.error
    is_fork = request.params.use_beam_search or len(result.continuations) > len(request.sequences)
    live = []
    for place, token in enumerate(result.continuations):
        parent = request.sequences[token.parent]
        child = parent.fork(place) if is_fork else parent
        StopChecker().append(child, request, token)
        (live if child.finish_reason is None else request.finished).append(child)
    request.sequences = live


def run(request: RequestState, logits_fn: LogitsFn) -> list[Sequence]:
    """Generates until the request ends; returns its outputs."""
    while request.sequences:
        logits = logits_fn([sequence.token_ids for sequence in request.sequences])
        [result] = Sampler(logits.shape[1]).sample([SampleRow(request, 0)], logits)
        advance(request, result)
    return select_outputs(request)
