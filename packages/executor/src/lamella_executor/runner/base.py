"""Runner: what the engine loop needs of whatever computes logits.

A `Runner` computes a step while the loop waits. A `LaunchingRunner` takes the next step while the last one computes. A
`PipelinedRunner` has several stages and takes a step for each of them.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from lamella_core.kernels.triton import NAN_LOGITS, NEGATIVE_INFINITE_LOGITS, POSITIVE_INFINITE_LOGITS
from lamella_executor.scheduler.plan import StepPlan
from lamella_executor.sequence import PENDING_TOKEN  # which launched plans may contain

__all__ = [
    "NAN_LOGITS",  # what `LaunchedStep.collect` returns instead of a token when a row's logits cannot be sampled
    "NEGATIVE_INFINITE_LOGITS",
    "PENDING_TOKEN",
    "POSITIVE_INFINITE_LOGITS",
    "LaunchedStep",
    "LaunchingRunner",
    "PipelinedRunner",
    "Runner",
]


class Runner(Protocol):
    """Computes one step. Implemented by `ModelRunner`, and by fakes in tests."""

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Does the plan's block copies, then computes its items.

        Returns:
            [plan.num_logits, vocab_size] float32, writable: for each item in order, its last ``num_logits`` tokens.
        """
        ...


class LaunchedStep(Protocol):
    """A step that was handed to the device; it may still be computing."""

    @property
    def logits(self) -> torch.Tensor | None:
        """[plan.num_logits, vocab_size] float32, writable, on the device; None if the host samples none of its rows.

        Valid until the runner's next launch; of a `PipelinedRunner`, from `collect` until then.
        """
        ...

    def collect(self) -> list[int]:
        """Waits until the step is done.

        Returns:
            The sampled token of each item of the plan that is sampled on the device (`ScheduledSequence.is_sampled` and
            `lamella_executor.sampler.device.is_device_sampled` of its request), in plan order; one of the negative
            codes above where the logits cannot be sampled. (The next step may have been launched with a row for such
            an item: it computes with any valid token, and its results are dropped.)
        """
        ...


@runtime_checkable
class LaunchingRunner(Protocol):
    """A runner that computes steps while the host goes on; samples plain requests where the logits are."""

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Enqueues a step: block copies, forward pass, sampling of the items that are sampled on the device.

        Steps are computed in the order of their launches, block copies and cache writes included: blocks that a step
        still reads or writes may be handed out again for the next one. A token id `PENDING_TOKEN` in an item stands for
        the token that the previously launched step sampled for its sequence. The plan is read before this returns.

        At most one other step is in flight. Whatever this raises, the step counts as not launched.
        """
        ...


@runtime_checkable
class PipelinedRunner(Protocol):
    """A runner whose steps pass through stages, one after another, each on devices of its own.

    Every stage computes the steps in the order of their launches. So a block that a step in flight still reads or
    writes may be handed out again for a later one: on each stage that one comes later too.

    Attributes:
        max_in_flight: steps that are launched and not collected at most; as many as stages, or more.
        is_sampling: the stages sample as a `LaunchingRunner` does; False: `collect` returns nothing, and the logits of
            all rows are for the host.
    """

    max_in_flight: int
    is_sampling: bool

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Takes a step and lets the stages compute it.

        No request is in it that has logits or tokens to come from a step in flight, so every token is known. The plan
        is read before this returns. Steps are collected in the order of their launches.

        Whatever this or `LaunchedStep.collect` raises is fatal: the other stages may have begun the step.
        """
        ...
