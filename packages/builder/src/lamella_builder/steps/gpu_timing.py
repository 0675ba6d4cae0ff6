"""Timing matmul plans on a GPU, with the model's own weights, so that it takes no further memory.

A kernel is captured in a CUDA graph that goes round over weights of one shape: what is timed has no host in it, and no
weight is in the L2 cache when its turn comes, as in a model.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from lamella_core.kernels.matmul import MatmulPlan, Scales

logger = logging.getLogger(__name__)

COLD_BYTES = 200 << 20  # of weights that go round; more than any L2 cache
TIMED_S = 1e-3  # of replays per kernel and row count
MOST_REPLAYS = 50


def time_gpu_plans(
    plans: Sequence[MatmulPlan], rows: Sequence[int], weights: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[dict[int, float]]:
    """Returns each plan's milliseconds per row count; infinite where one of its kernels fails.

    Kernels that plans share are timed once.

    Args:
        plans: for CUDA, in the layout of the weights.
        rows: row counts.
        weights: [N, K] of one shape and dtype on the GPU, at least one.
        dtype: of the activations and results; float8 weights get inputs of their own dtype and scales.
    """
    some = list(_until(weights, COLD_BYTES))
    k = some[0].shape[1]
    is_float8 = some[0].dtype == torch.float8_e4m3fn
    one = torch.ones((), dtype=torch.float32, device=some[0].device)
    scales = Scales(one, one, dtype) if is_float8 else None
    results: list[dict[int, float]] = [{} for _ in plans]
    for m in rows:
        x = torch.empty(m, k, dtype=dtype, device=some[0].device).uniform_(-1, 1).to(some[0].dtype)
        seconds: dict[str, float] = {}
        for plan, result in zip(plans, results, strict=True):
            name = plan.kernel_name(m)
            if name not in seconds:
                turns = itertools.cycle(some)
                seconds[name] = _timed(name, functools.partial(_run, plan, x, turns, scales), len(some))
            result[m] = seconds[name] * 1e3
    return results


def _run(plan: MatmulPlan, x: torch.Tensor, turns: Iterator[torch.Tensor], scales: Scales | None) -> None:
    weight = next(turns)
    plan.run(x, weight, weight.shape[0], None, scales)


def _until(weights: Sequence[torch.Tensor], num_bytes: int) -> Sequence[torch.Tensor]:
    """Returns the first weights that together have so many bytes; all if they have less."""
    count = -(-num_bytes // max(1, weights[0].nbytes))
    return weights[: max(1, count)]


def _timed(name: str, run: Callable[[], object], launches: int) -> float:
    try:
        return graph_seconds(run, max(4, launches))
    except RuntimeError as error:  # out of resources, or a shape that the library refuses
        logger.warning("matmul kernel %s is left out: %s", name, str(error).splitlines()[0])
        return math.inf


def graph_seconds(run: Callable[[], object], launches: int) -> float:
    """Returns the seconds of one launch on the GPU: ``run`` is captured ``launches`` times, and that is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, and chooses algorithms, outside the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(launches):
            run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    first = min(replay(1), replay(1))
    return replay(max(1, min(MOST_REPLAYS, int(TIMED_S / max(first, 1e-9))))) / launches
