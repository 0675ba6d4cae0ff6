"""Runner: what the engine loop needs of whatever computes logits."""

from __future__ import annotations

from typing import Protocol

import torch

from lamella_executor.scheduler.plan import StepPlan


class Runner(Protocol):
    """Computes one step. Implemented by `ModelRunner`, and by fakes in tests."""

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Does the plan's block copies, then computes its items.

        Returns:
            [plan.num_logits, vocab_size] float32, writable: for each item in order, its last ``num_logits`` tokens.
        """
        ...
