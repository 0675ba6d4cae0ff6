"""ScoringLoop: takes what waits, packs it into steps, computes scores. Driven by an `EngineThread`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lamella_core.errors import StepError
from lamella_core.models.base import CausalLM
from lamella_executor.failures import detach
from lamella_executor.scoring.packed import PackedContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class ScoreRequest:
    """A checked text to be scored, and the future of its scores."""

    token_ids: list[int]
    token_types: list[int] | None  # which part each token is in; None: all in the first
    rows: list[int] | None  # tokens whose scores are wanted, for models that score tokens; None: all
    future: Future[Tensor] = field(default_factory=Future)  # [labels], or [rows, labels]; float32 on the host

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self.future.done()

    def fail(self, error: Exception) -> None:
        """Ends the request before the loop has seen it."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class ScoringLoop:
    """Implements `lamella_executor.engine_thread.Loop` for a model that scores.

    Args:
        model: on the device where it runs.
        max_batch_size: texts of one step at most.
        max_num_tokens: tokens of one step at most; a longer text is a step of its own.
    """

    needs_host = False  # a step has few launches

    def __init__(self, model: CausalLM, *, max_batch_size: int, max_num_tokens: int) -> None:
        self._model = model
        self._max_batch_size, self._max_num_tokens = max_batch_size, max_num_tokens
        self._waiting: deque[ScoreRequest] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def submit(self, command: ScoreRequest) -> None:
        """Queues a text whose future has not been cancelled."""
        if command.future.set_running_or_notify_cancel():
            self._waiting.append(command)

    def abort(self, request_id: int) -> None:
        """Does nothing: a text takes one step."""

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """Ends every waiting request with an error of its own."""
        while self._waiting:
            self._waiting.popleft().future.set_exception(make_error())

    abandon = fail_all  # what is in a step has left the queue

    @torch.inference_mode()
    def step(self) -> None:
        """Computes the next texts, first come, first served. If the step fails, they fail, and the rest goes on."""
        batch = [self._waiting.popleft()]
        num_tokens = len(batch[0].token_ids)
        while self._waiting and len(batch) < self._max_batch_size:
            num_tokens += len(self._waiting[0].token_ids)
            if num_tokens > self._max_num_tokens:
                break
            batch.append(self._waiting.popleft())
        try:
            scores = self._scores(batch)
        except Exception as cause:  # noqa: BLE001 - a failing step ends its requests, not the engine
            logger.error("a step failed, %d texts fail with it\n%s", len(batch), detach(cause))
            for request in batch:
                error = StepError(f"the step that scored this text failed with {type(cause).__name__}: {cause}")
                error.__cause__ = cause
                request.future.set_exception(error)
            return
        for request, rows in zip(batch, scores, strict=True):
            request.future.set_result(rows)

    def _scores(self, batch: list[ScoreRequest]) -> list[Tensor]:
        """Returns each text's scores: [labels], or [rows, labels] of a model that scores tokens."""
        model, device = self._model, self._model.device
        lengths = [len(request.token_ids) for request in batch]
        types = None
        if any(request.token_types is not None for request in batch):
            types = torch.tensor([t for r in batch for t in (r.token_types or [0] * len(r.token_ids))])
        ctx = PackedContext(lengths, is_causal=model.is_causal, token_types=types).to(device)
        ids = torch.tensor([token for request in batch for token in request.token_ids])
        positions = torch.cat([torch.arange(length) for length in lengths])
        wanted = [_wanted_rows(request, model.pooling, model.config.pad_token_id) for request in batch]
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        rows = torch.tensor([start + row for start, own in zip(starts, wanted) for row in own], dtype=torch.int64)
        hidden = model(ids.to(device), positions.to(device), ctx, rows=rows.to(device))
        scores = model.compute_logits(hidden, ctx).cpu()
        parts = scores.split([len(own) for own in wanted])
        return [part if model.pooling == "tokens" else part[0] for part in parts]


def _wanted_rows(request: ScoreRequest, pooling: str, padding: int | None) -> list[int]:
    """Returns the tokens of a text that its scores are read from; the last one is the last that is no padding."""
    length = len(request.token_ids)
    if pooling == "first":
        return [0]
    if pooling == "last":
        return [next((place for place in reversed(range(length)) if request.token_ids[place] != padding), 0)]
    return list(range(length)) if request.rows is None else request.rows
