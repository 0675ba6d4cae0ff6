"""A pipeline of fake stages: holds the loop to what `PipelinedRunner` promises them, and notes who worked when."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from tests.support.fake_device import FakeDevice, FakeStep, require

from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import PENDING_TOKEN, RequestState


class PipelinedStep(FakeStep):
    """A step on its way; its logits can be read from its collection to the next launch."""

    device: FakePipeline

    @property
    def logits(self) -> torch.Tensor | None:
        require(self not in self.device.in_flight, "logits are read before the step was collected")
        require(self.device.num_steps == self.last_launch, "logits are read after a later launch")
        return self.kept_logits

    def collect(self) -> list[int]:
        self.last_launch = self.device.num_steps
        self.device.waiting.pop(self.number)
        self.device.log.append(("collect", self.number))
        return super().collect()


@dataclass
class FakePipeline(FakeDevice):
    """A `PipelinedRunner`.

    ``log`` has an entry for each launch (stage 0 begins the step) and each collection (the last stage has ended it).
    """

    max_in_flight: int = 2
    is_sampling: bool = True
    log: list[tuple[str, int]] = field(default_factory=list)
    waiting: dict[int, set[RequestState]] = field(default_factory=dict)  # step -> requests with results in flight

    def launch(self, plan: StepPlan) -> FakeStep:
        number = self.num_steps + 1
        require(plan.items, "an empty step was launched")
        require(len(self.in_flight) < self.max_in_flight, "more steps are in flight than the stages take")
        requests = {item.request for item in plan.items}
        require(all(requests.isdisjoint(others) for others in self.waiting.values()), "a waiting request is planned")
        self.waiting[number] = {item.request for item in plan.items if item.num_logits}
        self.log.append(("launch", number))
        others, self.in_flight = self.in_flight, []
        try:
            step = super().launch(plan)
        finally:
            self.in_flight = others
        self.num_overlapped += bool(others)
        taken = PipelinedStep(self, number, step.kept_logits, step.tokens, step.error)  # type: ignore[attr-defined]
        self.in_flight.append(taken)
        return taken

    def _known(self, item: ScheduledSequence) -> tuple[int, ...]:
        require(PENDING_TOKEN not in item.sequence.token_ids, "a token is pending in a pipeline")
        return super()._known(item)

    def _sample(self, plan: StepPlan, logits: torch.Tensor) -> tuple[SequenceOf[tuple[object, int]], bool]:  # type: ignore[override]
        return super()._sample(plan, logits) if self.is_sampling else ([], plan.num_logits > 0)

    @property
    def overlap(self) -> float:
        """Steps in flight on average while a step is collected, itself included."""
        depths, depth = [], 0
        for event, _ in self.log:
            depths += [depth] if event == "collect" else []
            depth += 1 if event == "launch" else -1
        return sum(depths) / len(depths)
