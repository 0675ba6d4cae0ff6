"""CPU matmul kernels against each other and against this machine's ceilings: GB/s and GFLOP/s per shape and row count.

    python benchmarks/cpu_kernels.py [--threads 2] [--dtype bfloat16 float32] [--rows 1 4 16 64] [--shapes 2048x2048]

Candidates take turns (round robin), each on weights too large together to stay in the caches, so that every call reads
them from memory as a model does. Printed: medians, and the least time in brackets. The last column is the fraction of
the floor, the larger of weight bytes over measured read bandwidth and FLOPs over the measured multiply-add rate.
On a machine that others use as well, --cpu-time measures one thread by the processor time it got.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

from lamella_core.kernels import matmul
from lamella_core.kernels.cpu.build import native_status

SHAPES = ["2048x2048", "11264x2048", "2048x5632", "32000x2048"]  # N x K of the TinyLlama-1.1B shape
COLD_BYTES = 128 * 2**20  # weights of one candidate together exceed this


@dataclass(frozen=True)
class Result:
    kernel: str
    dtype: str
    n: int
    k: int
    rows: int
    median_s: float
    least_s: float
    gb_per_s: float
    gflop_per_s: float
    floor_fraction: float


class Candidate:
    """One kernel and enough copies of its weight that none is cached when its turn comes."""

    def __init__(self, kernel: matmul.MatmulKernel, dtype: torch.dtype, n: int, k: int) -> None:
        self.kernel, self.n = kernel, n
        weight = matmul.to_layout(torch.randn(n, k).to(dtype), kernel.layout)
        copies = max(2, -(-COLD_BYTES // (weight.numel() * weight.element_size())))
        self.weights = [weight.clone() for _ in range(copies)]
        self.turn = 0

    def time(self, x: torch.Tensor, clock: Callable[[], float]) -> float:
        self.turn = (self.turn + 1) % len(self.weights)
        start = clock()
        self.kernel(x, self.weights[self.turn], self.n, None)
        return clock() - start


def measure(
    dtype: torch.dtype,
    n: int,
    k: int,
    names: list[str],
    rows: list[int],
    budget_s: float,
    clock: Callable[[], float],
    ceilings: tuple[float, float],
) -> list[Result]:
    """All candidates of one shape, alternating, for about ``budget_s`` per row count."""
    kernels = [matmul.KERNELS[name] for name in names]
    candidates = [Candidate(kernel, dtype, n, k) for kernel in kernels if kernel.available(dtype, n, k)]
    weight_bytes = n * k * torch.empty(0, dtype=dtype).element_size()
    results = []
    for m in rows:
        x = torch.randn(m, k).to(dtype)
        times: list[list[float]] = [[] for _ in candidates]
        once = sum(candidate.time(x, clock) for candidate in candidates)
        for _ in range(max(3, min(50, int(budget_s / once)))):
            for candidate, kept in zip(candidates, times):
                kept.append(candidate.time(x, clock))
        flops = 2 * m * n * k
        floor = max(weight_bytes / ceilings[0], flops / ceilings[1])
        for candidate, kept in zip(candidates, times):
            median, least = statistics.median(kept), min(kept)
            name = candidate.kernel.name
            kind = str(dtype).removeprefix("torch.")
            rates = (weight_bytes / median / 1e9, flops / median / 1e9, floor / median)
            results.append(Result(name, kind, n, k, m, median, least, *rates))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N x K")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 512])
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per shape and row count")
    parser.add_argument("--kernels", nargs="+", default=sorted(matmul.KERNELS))
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time instead of wall time")
    parser.add_argument("--report-json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    bandwidth = machine.read_bandwidth()
    status = native_status()
    print(machine.describe())
    print(f"native kernels: {status.compiler if status.available else 'off: ' + status.reason}")
    results: list[Result] = []
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        rate = machine.matmul_rate(dtype)
        print(f"\n{name}: read bandwidth {bandwidth / 1e9:.1f} GB/s, multiply-add rate {rate / 1e9:.0f} GFLOP/s")
        print(
            f"{'N x K':>12} {'M':>4} {'kernel':>14} {'ms':>9} {'(least)':>9} {'GB/s':>6} {'GFLOP/s':>8} {'of floor':>8}"
        )
        for shape in arguments.shapes:
            n, k = map(int, shape.split("x"))
            for r in measure(
                dtype, n, k, arguments.kernels, arguments.rows, arguments.budget, clock, (bandwidth, rate)
            ):
                print(
                    f"{shape:>12} {r.rows:>4} {r.kernel:>14} {r.median_s * 1e3:>9.3f} {r.least_s * 1e3:>9.3f}"
                    f" {r.gb_per_s:>6.1f} {r.gflop_per_s:>8.1f} {r.floor_fraction:>8.2f}",
                    flush=True,
                )
                results.append(r)
    if arguments.report_json:
        arguments.report_json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
