"""A CPU runner as a `LaunchingRunner`: real models on the path that devices take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lamella_core.errors import RequestError
from lamella_executor.runner.base import NAN_LOGITS, PENDING_TOKEN, Runner
from lamella_executor.sampler.device import is_device_sampled
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.sampler.types import SampleRow
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import Sequence


@dataclass(eq=False)
class _Step:
    logits: torch.Tensor | None
    tokens: list[int]

    def collect(self) -> list[int]:
        return self.tokens


class CpuLaunchingRunner:
    """Computes in the launch, samples with the host's sampler, and shows the tokens when they are collected."""

    def __init__(self, runner: Runner, vocab_size: int) -> None:
        self._runner = runner
        self._sampler = Sampler(vocab_size)
        self._last: dict[Sequence, int] = {}  # sampled by the launch before
        self.num_pending = 0  # tokens computed before the host knew them

    def launch(self, plan: StepPlan) -> _Step:
        known = StepPlan([self._known(item) for item in plan.items], plan.block_copies)
        logits = self._runner.run(known).clone()
        row, tokens, has_host_rows = 0, {}, False
        for item in plan.items:
            row += item.num_logits
            if item.is_sampled and is_device_sampled(item.request):
                (result,) = self._sampler.sample([SampleRow(item.request, row - 1)], logits)
                is_bad = isinstance(result.error, RequestError)
                tokens[item.sequence] = NAN_LOGITS if is_bad else result.continuations[0].token_id
            else:
                has_host_rows = has_host_rows or item.num_logits > 0
        self._last = tokens
        return _Step(logits if has_host_rows else None, list(tokens.values()))

    def _known(self, item: ScheduledSequence) -> ScheduledSequence:
        sequence = item.sequence
        if sequence.token_ids[item.end - 1] != PENDING_TOKEN:
            return item
        self.num_pending += 1
        tokens = [*sequence.token_ids[: item.end - 1], max(self._last[sequence], 0)]
        return ScheduledSequence(item.request, replace(sequence, token_ids=tokens), item.start, item.num_tokens, 1)
