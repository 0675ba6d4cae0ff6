"""Timing matmul plans on a GPU, with the model's own weights, so that it takes no further memory.

A kernel is captured in a CUDA graph that goes round over weights of one shape: what is timed has no host in it, and no
weight is in the L2 cache when its turn comes, as in a model.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lamella_core.kernels.matmul import MatmulKernel, MatmulPlan, Scales, find_kernel

logger = logging.getLogger(__name__)

COLD_BYTES = 200 << 20  # of weights that go round; more than any L2 cache
TIMED_S = 1e-3  # of replays per kernel and row count
MOST_REPLAYS = 50
# Kernels timed in turns: turns, the seconds of one, the most replays in one, and which take part.
_TURNS, _TURN_S, _MOST_IN_A_TURN, _WORTH_MORE = 3, 5e-4, 8, 1.1
_LAUNCHES, _MANY_ROWS = (3, 8), 8192  # in a graph; fewer of many rows


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
    results: list[dict[int, float]] = [{} for _ in plans]
    for m in rows:
        x, scales = _inputs(some[0], m, dtype)
        seconds: dict[str, float] = {}
        for plan, result in zip(plans, results, strict=True):
            name = plan.kernel_name(m)
            if name not in seconds:
                turns = itertools.cycle(some)
                seconds[name] = _timed(
                    name, functools.partial(_multiply, find_kernel(name), x, turns, scales), len(some)
                )
            result[m] = seconds[name] * 1e3
    return results


def _inputs(weight: torch.Tensor, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, Scales | None]:
    """Returns x [rows, K] to multiply with a weight [N, K], and the scales of a float8 product."""
    device = weight.device
    x = torch.empty(rows, weight.shape[1], dtype=dtype, device=device).uniform_(-1, 1).to(weight.dtype)
    one = torch.ones((), dtype=torch.float32, device=device)
    return x, Scales(one, one, dtype) if weight.dtype == torch.float8_e4m3fn else None


def _multiply(kernel: MatmulKernel, x: torch.Tensor, turns: Iterator[torch.Tensor], scales: Scales | None) -> None:
    weight = next(turns)
    kernel(x, weight, weight.shape[0], None, scales)


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
    graph = record(run, launches)
    first = min(_replay(graph, 1), _replay(graph, 1))
    return _replay(graph, max(1, min(MOST_REPLAYS, int(TIMED_S / max(first, 1e-9))))) / launches


def record(
    run: Callable[[], object], launches: int, stream: torch.cuda.Stream | None = None, pool: Any = None
) -> torch.cuda.CUDAGraph:
    """Returns a graph of ``launches`` calls of ``run``.

    Args:
        run: launches kernels on the current stream.
        launches: how often.
        stream: to record on.
        pool: of memory, for graphs that are replayed one after another.
    """
    stream = torch.cuda.Stream() if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()  # compiles, and chooses algorithms, outside the capture
        stream.synchronize()
        graph.capture_begin(pool=pool or torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        try:
            for _ in range(launches):
                run()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the capture is broken already; this ends it
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Returns the seconds of one of ``times`` replays."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


class GpuTimer:
    """Times kernels against each other with the same weights, in turns: what slows the GPU down hits all of them."""

    def __init__(self, weights: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        """Takes weights and the dtype of results, see `time_gpu_plans`."""
        self._weights, self._dtype = _until(weights, COLD_BYTES), dtype
        self._stream = torch.cuda.Stream()

    def __call__(self, rows: int, names: Sequence[str]) -> dict[str, float]:
        """Returns each kernel's least seconds for so many rows; infinite where it fails. The first is torch's."""
        x, scales = _inputs(self._weights[0], rows, self._dtype)
        launches = max(_LAUNCHES[0], min(_LAUNCHES[1], _MANY_ROWS // rows))
        graphs, pool = {}, torch.cuda.graph_pool_handle()
        for name in names:
            run = functools.partial(_multiply, find_kernel(name), x, itertools.cycle(self._weights), scales)
            try:
                graphs[name] = record(run, launches, self._stream, pool)
            except RuntimeError as error:
                logger.warning("matmul kernel %s is left out: %s", name, str(error).splitlines()[0])
        seconds = _in_turns(graphs, names[0])
        graphs.clear()
        torch.cuda.empty_cache()  # results of many rows are large, and another stream's memory is not used again
        return {name: seconds.get(name, math.inf) / launches for name in names}


def _in_turns(graphs: Mapping[str, torch.cuda.CUDAGraph], always: str) -> dict[str, float]:
    """Returns the least seconds of a replay of each; those that begin clearly slower than the best have few samples."""
    seconds = {name: min(_replay(graph, 1), _replay(graph, 1)) for name, graph in graphs.items()}
    best = min(seconds.values(), default=1.0)
    times = max(1, min(_MOST_IN_A_TURN, int(_TURN_S / max(best, 1e-9))))
    live = [name for name in seconds if name == always or seconds[name] <= _WORTH_MORE * best]
    for _, name in itertools.product(range(_TURNS), live):
        seconds[name] = min(seconds[name], _replay(graphs[name], times))
    return seconds
