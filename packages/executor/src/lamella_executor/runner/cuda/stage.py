"""What a CUDA runner does for its place in a pipeline: hidden states come in, go on, and tokens reach rank 0.

Hidden states are received, computed and sent on the current stream, in the order of the steps. So their buffers, those
of captured steps included, are written again only when the next stage has taken what was in them. Results arrive on a
stream of their own on rank 0, which meanwhile computes its stage of later steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lamella_executor.distributed.pipeline import PendingResult, StageLinks
from lamella_executor.runner.base import LaunchedStep
from lamella_executor.sampler.device import is_device_sampled
from lamella_executor.scheduler.plan import StepPlan

if TYPE_CHECKING:
    from lamella_executor.runner.cuda.runner import CudaRunner


class Stage(Protocol):
    """A runner's place in the pipeline, if there is one."""

    is_last: bool  # computes logits and samples

    def hidden(self, num_rows: int) -> Tensor | None:
        """Returns the first layer's input [num_rows, H], at the same address always; None: the embedding makes it."""
        ...

    def begin(self, plan: StepPlan) -> None:
        """Enqueues the arrival of a step's hidden states in `hidden`."""
        ...

    def hand_over(self, hidden: Tensor) -> None:
        """Enqueues sending a step's hidden states [T, H] to the next stage; not on the last one."""
        ...

    def report(self, plan: StepPlan, tokens: Tensor, logits: Tensor | None) -> None:
        """Enqueues sending a step's results to rank 0; on the last stage.

        Args:
            plan: the step's.
            tokens: [num_tokens] int32, see `Results`.
            logits: [plan.num_logits, vocab_size] float32; None if the host samples none of its rows.
        """
        ...

    def finish(self, plan: StepPlan, step: LaunchedStep) -> LaunchedStep:
        """Returns what the launch returns for a step of which this rank's part is enqueued."""
        ...

    def close(self) -> None:
        """Waits for what was sent, or gives it up."""
        ...


class OnlyStage:
    """The `Stage` of a runner that has all layers."""

    is_last = True

    def hidden(self, num_rows: int) -> Tensor | None:
        return None

    def begin(self, plan: StepPlan) -> None: ...

    def hand_over(self, hidden: Tensor) -> None: ...

    def report(self, plan: StepPlan, tokens: Tensor, logits: Tensor | None) -> None: ...

    def finish(self, plan: StepPlan, step: LaunchedStep) -> LaunchedStep:
        return step

    def close(self) -> None: ...


@dataclass(frozen=True)
class Results:
    """Which results of a step go to rank 0; the same on the rank that sends and on the one that receives."""

    num_tokens: int  # rows that the device has sampled
    rows: list[int]  # of those, the ones that it was asked to sample
    logit_rows: list[int]  # of plan.num_logits, for the host

    @classmethod
    def of(cls, plan: StepPlan) -> Results:
        """Returns a plan's: a step of next tokens alone samples all its rows, another one those it was asked for."""
        items = plan.items
        rows: list[int] = []
        logit_rows: list[int] = []
        first_row = 0
        for item in items:
            if not item.num_logits:
                continue
            if is_device_sampled(item.request):
                rows.append(first_row)
            else:
                logit_rows += range(first_row, first_row + item.num_logits)
            first_row += item.num_logits
        if all([item.num_tokens == 1 == item.num_logits for item in items]):
            return cls(len(items) if rows else 0, rows, logit_rows)
        return cls(len(rows), list(range(len(rows))), logit_rows)


class PipelineStage:
    """The `Stage` of one rank among several.

    Args:
        links: to the other stages.
        max_rows: of a step.
        hidden_size: H.
        vocab_size: columns of logits.
        dtype: of hidden states.
        device: of this rank; "cpu" in tests.
    """

    def __init__(
        self,
        links: StageLinks,
        max_rows: int,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.is_last = links.is_last
        self._links = links
        self._vocab_size = vocab_size
        # [max_rows, H]; rows that pad a captured step hold what was there before, which is finite.
        self._hidden = None if links.is_first else torch.zeros(max_rows, hidden_size, dtype=dtype, device=device)
        self._arrivals = torch.cuda.Stream(device) if device.type == "cuda" and links.takes_results else None

    def hidden(self, num_rows: int) -> Tensor | None:
        return None if self._hidden is None else self._hidden[:num_rows]

    def begin(self, plan: StepPlan) -> None:
        if self._hidden is not None:
            self._links.receive_into(self._hidden[: plan.num_tokens])

    def hand_over(self, hidden: Tensor) -> None:
        self._links.hand_over(hidden)

    def report(self, plan: StepPlan, tokens: Tensor, logits: Tensor | None) -> None:
        if not self._links.sends_results:
            return
        results = Results.of(plan)
        if results.num_tokens:
            self._links.send_result(tokens[: results.num_tokens].clone())
        if logits is not None and results.logit_rows:
            rows = results.logit_rows
            if len(rows) < plan.num_logits:
                logits = logits.index_select(0, torch.tensor(rows, device=logits.device))
            self._links.send_result(logits)

    def finish(self, plan: StepPlan, step: LaunchedStep) -> LaunchedStep:
        if not self._links.takes_results:
            return step
        results = Results.of(plan)
        tokens = self._expect((results.num_tokens,), torch.int32) if results.num_tokens else None
        shape = (len(results.logit_rows), self._vocab_size)
        logits = self._expect(shape, torch.float32) if results.logit_rows else None
        return RemoteStep(step, results, plan.num_logits, tokens, logits)

    def close(self) -> None:
        self._links.close()

    def _expect(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Arrival:
        if self._arrivals is None:
            return _Arrival(self._links.expect_result(shape, dtype), None)
        with torch.cuda.stream(self._arrivals):
            on_device = self._links.expect_result(shape, dtype).wait()
            on_host = torch.empty(shape, dtype=dtype, pin_memory=True)
            on_host.copy_(on_device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return _Arrival(on_host, event)


class _Arrival:
    """A tensor on its way to rank 0's host memory."""

    def __init__(self, tensor: Tensor | PendingResult, event: torch.cuda.Event | None) -> None:
        self._tensor = tensor
        self._event = event

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.wait() if isinstance(self._tensor, PendingResult) else self._tensor


class RemoteStep:
    """A step as rank 0 sees it: its own part, and results that come from the last stage."""

    def __init__(
        self, own: LaunchedStep, results: Results, num_logits: int, tokens: _Arrival | None, logits: _Arrival | None
    ) -> None:
        self._own = own
        self._results = results
        self._num_logits = num_logits
        self._tokens = tokens
        self._arriving_logits = logits
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor | None:
        """[plan.num_logits, vocab_size] float32 in host memory once collected; only rows for the host have contents."""
        return self._logits

    def collect(self) -> list[int]:
        """Waits for this rank's part, so that its errors show, then for the results; see `LaunchedStep.collect`."""
        self._own.collect()
        if self._arriving_logits is not None:
            arrived, rows = self._arriving_logits.wait(), self._results.logit_rows
            self._logits = arrived
            if len(rows) < self._num_logits:
                self._logits = torch.empty(self._num_logits, arrived.shape[1])
                self._logits[rows] = arrived
        if self._tokens is None:
            return []
        tokens = self._tokens.wait().tolist()
        return [tokens[row] for row in self._results.rows]


class CudaStageRunner:
    """A `lamella_executor.runner.base.PipelinedRunner`: one rank of a pipeline of GPUs.

    Args:
        runner: of this rank, with its `PipelineStage`.
        max_in_flight: the number of stages.
    """

    is_sampling = True

    def __init__(self, runner: CudaRunner, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self._runner = runner

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Enqueues this rank's part of a step; on rank 0 the step returned has the results."""
        return self._runner.launch(plan)

    def close(self) -> None:
        """Gives the device's memory back; the runner cannot be used afterwards."""
        self._runner.close()
