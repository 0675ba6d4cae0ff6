"""StageRunner: one rank of a pipeline on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella_executor.distributed.pipeline import PendingResult, StageLinks
from lamella_executor.runner.model_runner import ModelRunner
from lamella_executor.scheduler.plan import StepPlan


class StageStep:
    """A `lamella_executor.runner.base.LaunchedStep`; only rank 0's has results."""

    def __init__(self, result: PendingResult | None) -> None:
        self._result = result
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor | None:
        """[plan.num_logits, vocab_size] float32 once the step is collected; None if it has none."""
        return self._logits

    def collect(self) -> list[int]:
        """Waits until the last stage's logits are here; the host samples, so no tokens come with them."""
        if self._result is not None:
            self._logits = self._result.wait()
        return []


class StageRunner:
    """A `lamella_executor.runner.base.PipelinedRunner`, on each of its ranks.

    A launch computes this rank's stage: it takes the hidden states of the stage before, and hands its own to the next
    one without waiting for it. On rank 0 it returns then, and the other stages go on. Logits of the rows that are
    wanted go from the last stage to rank 0.

    Args:
        runner: computes this rank's layers.
        links: to the other stages.
    """

    is_sampling = False

    def __init__(self, runner: ModelRunner, links: StageLinks) -> None:
        self.max_in_flight = links.num_stages
        self._runner = runner
        self._links = links

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StageStep:
        """Computes this rank's stage of a step; see `PipelinedRunner.launch`."""
        links, config = self._links, self._runner.config
        result: PendingResult | None = None
        out = self._runner.run_stage(
            plan, links.receive_hidden(plan.num_tokens, config.hidden_size, config.torch_dtype)
        )
        if not links.is_last:
            links.send_hidden(out)
        elif links.sends_results and plan.num_logits:
            links.send_result(out)
        if links.takes_results and plan.num_logits:
            result = links.expect_result((plan.num_logits, config.vocab_size), torch.float32)
        return StageStep(result)

    def close(self) -> None:
        """Waits for what was sent; the runner cannot be used afterwards."""
        self._links.close()
