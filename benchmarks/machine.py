"""Measures the two ceilings of this machine that every CPU number is set against, and names it."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def median_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median wall time of ``run`` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes per second of a pure read: the sum of 1 GiB of float32, far beyond the caches."""
    data = torch.ones(2**28)
    return data.numel() * 4 / median_seconds(data.sum)


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Best FLOP per second of the framework's square matrix product in ``dtype`` or, if faster, in float32.

    A bfloat16 product may always be computed by converting to float32, so that rate bounds it from below.
    """
    rates = []
    for kind in {dtype, torch.float32}:
        a, b = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
        rows = a if kind is torch.float32 else a[:128]  # keeps a slow bfloat16 path short
        rates.append(2 * rows.shape[0] * size * size / median_seconds(lambda rows=rows, b=b: rows @ b, repeats=3))
    return max(rates)


def describe() -> str:
    """One line: processor, threads, memory, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    simd = torch.backends.cpu.get_cpu_capability()
    return (
        f"{model} ({simd}), {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
