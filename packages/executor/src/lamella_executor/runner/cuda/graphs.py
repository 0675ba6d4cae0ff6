"""Decoding steps recorded as CUDA graphs, one pair of graphs per padded number of rows.

The forward pass and what follows it (output layer, sampling) are recorded apart: one forward serves greedy and general
sampling, and rows that the host samples. All graphs share one memory pool, so only one step may run at a time; the
largest is recorded first, and smaller ones fit into its memory.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lamella_executor.runner.cuda.batch import StepInputs

logger = logging.getLogger(__name__)


def capture_sizes(max_size: int) -> list[int]:
    """Returns the padded batch sizes, ascending; the last is ``max_size``.

    Padding takes less than half of up to 8 rows, fewer than 8 rows up to 32, 16 up to 256, and then an eighth at most.
    """
    sizes = [1, 2, 4, *range(8, 32, 8)]
    step, size = 16, 32
    while size < max_size:
        sizes.append(size)
        if size >= 16 * step:
            step *= 2
        size += step
    return [size for size in sizes if size < max_size] + [max_size]


def why_not_capturable(model: nn.Module) -> str | None:
    """Returns why a model's forward pass cannot be recorded; None if nothing is known against it.

    A module whose forward waits for a value of the device has an attribute ``waits_for_device`` that is True.
    """
    for name, module in model.named_modules():
        if getattr(module, "waits_for_device", False):
            return f"{name} ({type(module).__name__}) waits for values of the device"
    return None


class DecodeStep(Protocol):
    """The two halves of a decoding step, each enqueued on the current stream; made by the runner."""

    @property
    def is_sampling(self) -> bool:
        """Whether there is a second half; other ranks have it for pipeline stages before the last."""
        ...

    def inputs(self, size: int) -> StepInputs:
        """Returns the inputs of a step of ``size`` rows, all padding, at the addresses that every such step uses."""
        ...

    def forward(self, inputs: StepInputs) -> Tensor:
        """Computes hidden states [size, H]."""
        ...

    def sample(self, hidden: Tensor, inputs: StepInputs, *, is_greedy: bool) -> None:
        """Computes logits and leaves the sampled tokens in the outbox."""
        ...


@dataclass(frozen=True)
class CapturedStep:
    """A decoding step of one size."""

    size: int
    hidden: Tensor  # [size, H], rewritten by each replay of `forward`
    forward: torch.cuda.CUDAGraph
    sample: dict[bool, torch.cuda.CUDAGraph]  # by whether all rows are greedy; empty where nothing is sampled


class DecodeGraphs:
    """The recorded steps of one engine."""

    def __init__(self) -> None:
        self._steps: dict[int, CapturedStep] = {}
        self._sizes: list[int] = []

    def __len__(self) -> int:
        return len(self._steps)

    def find(self, num_rows: int) -> CapturedStep | None:
        """Returns the smallest step that holds ``num_rows``; None if there is none."""
        place = bisect.bisect_left(self._sizes, num_rows)
        return self._steps[self._sizes[place]] if place < len(self._sizes) else None

    def capture(self, step: DecodeStep, sizes: list[int]) -> None:
        """Records steps of these sizes. The current stream runs each once before, so that its kernels are compiled.

        Raises:
            RuntimeError: something in the step cannot be recorded, or the device ran out of memory; nothing is kept.
        """
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        try:
            for size in sorted(sizes, reverse=True):
                self._steps[size] = _capture_step(step, size, pool, stream)
        except BaseException:
            self.clear()
            raise
        self._sizes = sorted(self._steps)
        num_graphs = sum(1 + len(captured.sample) for captured in self._steps.values())
        logger.info(
            "recorded %d CUDA graphs for %d batch sizes up to %d in %.1f s",
            num_graphs, len(self._steps), self._sizes[-1], time.monotonic() - started,
        )  # fmt: skip

    def clear(self) -> None:
        """Gives the graphs and their memory back; nothing may be running."""
        self._steps.clear()
        self._sizes = []


def _capture_step(step: DecodeStep, size: int, pool: Any, stream: torch.cuda.Stream) -> CapturedStep:
    inputs = step.inputs(size)
    kinds = (True, False) if step.is_sampling else ()
    warm = step.forward(inputs)
    for is_greedy in kinds:
        step.sample(warm, inputs, is_greedy=is_greedy)
    del warm
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kept: list[Tensor] = []
        forward = _record(lambda: kept.append(step.forward(inputs)), pool)
        hidden = kept.pop()
        sample = {
            is_greedy: _record(functools.partial(step.sample, hidden, inputs, is_greedy=is_greedy), pool)
            for is_greedy in kinds
        }
    torch.cuda.current_stream().wait_stream(stream)
    return CapturedStep(size, hidden, forward, sample)


def _record(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Records what a function enqueues on the current stream; other threads may use the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        function()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the capture is broken already; this ends it
            graph.capture_end()
        raise
    graph.capture_end()
    return graph
