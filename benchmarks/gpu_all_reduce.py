"""Sums over 2, 4, ... GPUs inside CUDA graphs: NCCL, one exchange, two exchanges; with the norm after it and fused;
gathers of messages of the same size through NCCL, with the copy that puts its rows in order, and in one exchange.

    python benchmarks/gpu_all_reduce.py --gpus 2 4

prints microseconds a call (the slowest rank's median), a line for each message size, and for each number of GPUs the
largest message that each kernel of ours sums faster than NCCL. It starts a process a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lamella_core.kernels import ops
from lamella_core.kernels.triton.all_reduce_norm import can_sum_and_norm, sum_and_norm
from lamella_core.mapping import Mapping
from lamella_executor.distributed.gpu import CudaCommunicator, SumLimits
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.store import host_store, reach_store

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
HIDDEN = (4096, 8192)
DTYPE = torch.bfloat16
CALLS = 20  # in a graph
REPLAYS = 12
LARGEST_OWN_BYTES = 16 << 20  # larger messages go to NCCL without a measurement
HUGE = 1 << 40
WAYS = {"nccl": SumLimits(0, 0, 0, 0), "one": SumLimits(HUGE, 0, 0, HUGE), "two": SumLimits(0, HUGE, 0, HUGE)}


def graph_us(call: Callable[[], Any]) -> float:
    """Returns the median microseconds of a call inside a graph of `CALLS` of them."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))
    return times[len(times) // 2] * 1000.0 / CALLS


def measure(groups: RankGroups, rows: int, hidden: int) -> dict[str, float]:
    tp: Any = groups.tp
    peers = tp._memory.peers
    x = torch.randn(rows, hidden, device="cuda").to(DTYPE) * 1e-3
    residual, weight = torch.randn_like(x), torch.ones(hidden, dtype=DTYPE, device="cuda")
    scale = torch.tensor(0.05, device="cuda")
    found = {}
    for way, limits in WAYS.items():
        if way != "nccl" and x.nbytes > LARGEST_OWN_BYTES:
            continue
        sums = CudaCommunicator(tp._nccl, tp._memory, limits)
        found[way] = graph_us(lambda sums=sums: sums.all_reduce(x))
        found[f"{way}+norm"] = graph_us(
            lambda sums=sums: ops.rms_norm(sums.all_reduce(x), weight, 1e-5, residual, scale)
        )
        if way != "two":
            found[f"{way} gather"] = graph_us(lambda sums=sums: sums.all_gather(x))
    if can_sum_and_norm(x, residual, weight, peers) and x.nbytes <= LARGEST_OWN_BYTES:
        found["fused"] = graph_us(lambda: sum_and_norm(x, residual, weight, 1e-5, peers, scale))
    return found


def rank_main(size: int, rank: int, port: int, hiddens: list[int], rows: list[int]) -> None:
    torch.cuda.set_device(rank)
    mapping = Mapping(world_size=size, tp_size=size, rank=rank)
    groups = RankGroups.join(mapping, reach_store("127.0.0.1", port), device=f"cuda:{rank}", timeout_s=120.0)
    results = [
        {"hidden": hidden, "rows": count, **measure(groups, count, hidden)} for hidden in hiddens for count in rows
    ]  # fmt: skip
    groups.agree_min(0)  # no rank frees its memory while another still writes there
    groups.close()
    print(json.dumps(results))


def run(size: int, hiddens: list[int], rows: list[int]) -> list[dict[str, float]]:
    """Returns the slowest rank's times of each case."""
    store = host_store()
    environment = dict(os.environ, NCCL_NVLS_ENABLE="0", OMP_NUM_THREADS="4")
    cases = ["--hidden", *map(str, hiddens), "--rows", *map(str, rows)]
    command = [sys.executable, str(Path(__file__)), *cases, "--rank"]
    processes = [
        subprocess.Popen(
            [*command, str(size), str(rank), str(store.port)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(size)
    ]
    try:
        every = [json.loads(process.communicate(timeout=500)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [{key: max(rank[key] for rank in ranks) for key in ranks[0]} for ranks in zip(*every, strict=True)]


def show(size: int, results: list[dict[str, float]]) -> None:
    columns = ("nccl", "one", "two", "nccl+norm", "one+norm", "two+norm", "fused", "nccl gather", "one gather")
    print(f"\n{size} GPUs, {DTYPE}, microseconds\nhidden  rows      KiB " + "".join(f"{name:>12}" for name in columns))
    largest = dict.fromkeys(("one", "two", "fused", "one gather"), 0)
    for case in results:
        num_bytes = int(case["hidden"] * case["rows"] * DTYPE.itemsize)
        cells = "".join(f"{case[name]:12.1f}" if name in case else f"{'-':>12}" for name in columns)
        print(f"{case['hidden']:6.0f} {case['rows']:5.0f} {num_bytes / 1024:8.0f} {cells}")
        for name in largest:
            other = {"fused": "nccl+norm", "one gather": "nccl gather"}.get(name, "nccl")
            if name in case and case[name] < case[other]:
                largest[name] = max(largest[name], num_bytes)
    print("largest message in KiB that is faster than through NCCL:", {k: v // 1024 for k, v in largest.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[2])
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rank", type=int, nargs=3, help=argparse.SUPPRESS)  # size, rank, port: of a process
    options = parser.parse_args()
    if options.rank:
        rank_main(*options.rank, options.hidden, options.rows)
        return
    for size in options.gpus:
        if size <= torch.cuda.device_count():
            show(size, run(size, options.hidden, options.rows))


if __name__ == "__main__":
    main()
