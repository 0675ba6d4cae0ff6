"""One rank of a GPU test of `RankGroups`, a process of its own; rank r uses GPU r.

python -m tests.support.gpu_rank_process TASK WORLD_SIZE TP_SIZE RANK PORT
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lamella_core.errors import CommunicationError
from lamella_core.kernels import ops
from lamella_core.mapping import Mapping
from lamella_executor.distributed.gpu import CudaCommunicator, SumLimits
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.store import reach_store

TIMEOUT_S = 60.0
HUGE = 1 << 40
WAYS = {
    "one": SumLimits(HUGE, 0, HUGE, HUGE),
    "two": SumLimits(0, HUGE, 0, HUGE),
    "nccl": SumLimits(0, 0, 0, 0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 2), (1, 4096), (3, 100), (7, 8192), (64, 4096), (513, 2048))
REPLAYS = 100


def communicator(groups: RankGroups, way: str) -> CudaCommunicator:
    tp: Any = groups.tp
    assert tp._memory is not None, "these GPUs share no memory"
    return CudaCommunicator(tp._nccl, tp._memory, WAYS[way])


def summands(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Every rank's x, the same on all ranks."""
    parts = []
    for rank in range(size):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        parts.append(torch.randn(shape, generator=generator).to("cuda", dtype))
    return parts


def wrong(got: Tensor, parts: list[Tensor], exact: bool) -> str:
    """Empty if ``got`` is the sum of the parts: rounded once if exact, else after each addition."""
    expected, magnitude = sum(p.double() for p in parts), sum(p.double().abs() for p in parts)
    rounding = torch.finfo(got.dtype).eps * (expected.abs() / 2 if exact else magnitude * len(parts))
    error = (got.double() - expected).abs() - rounding - 2e-7 * len(parts) * magnitude
    return "" if bool((error <= 0).all()) else f"{tuple(got.shape)} {got.dtype}: off by {error.max().item()}"


def digest(tensors: list[Tensor]) -> str:
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def sums(groups: RankGroups) -> dict[str, Any]:
    """Sums every way, each size three times in a row; {"wrong": texts, "bits": digest of all results}."""
    problems, results = [], []
    rank, size = groups.tp.rank, groups.tp.size
    for way in WAYS:
        tp = communicator(groups, way)
        for dtype in DTYPES:
            for shape in SHAPES:
                for seed in range(3):
                    parts = summands(size, shape, dtype, seed)
                    results.append(tp.all_reduce(parts[rank].clone()))
                    problems.append(wrong(results[-1], parts, exact=way != "nccl" or size == 2))
    return {"wrong": [text for text in problems if text], "bits": digest(results)}


def norms(groups: RankGroups) -> dict[str, Any]:
    """The fused kernel against the sum and `rms_norm` by themselves; largest difference of normed rows in steps."""
    tp: Any = communicator(groups, "one")
    worst, results, totals_equal = 0.0, [], True
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((1, 4096), (5, 8192), (200, 2048), (3, 40)):
            x = summands(tp.size, shape, dtype, 1)[tp.rank]
            residual, weight = summands(2, shape, dtype, 2)[0], summands(1, shape[1:], dtype, 3)[0]
            total = tp.all_reduce(x.clone())
            for scale in (None, torch.tensor(0.02, device="cuda")):
                expected, stream = ops.rms_norm(total, weight, 1e-5, residual, scale)
                got, fused = tp.rms_norm_of_sum(x, residual, weight, 1e-5, scale)
                totals_equal &= torch.equal(fused, stream)
                step = torch.finfo(got.dtype).eps
                difference = (got.float() - expected.float()).abs() / (expected.float().abs() + 1e-2)
                worst = max(worst, difference.max().item() / step)
                results += [got.view(torch.uint8), fused]
    return {"worst_steps": worst, "totals_equal": totals_equal, "bits": digest(results)}


def graphs(groups: RankGroups) -> dict[str, Any]:
    """All ways in one CUDA graph, replayed with other inputs each time."""
    rank, size = groups.tp.rank, groups.tp.size
    shapes = ((1, 4096), (16, 8192), (5, 2048))
    inputs = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    ways = [communicator(groups, way) for way in WAYS]

    def run() -> list[Tensor]:
        return [tp.all_reduce(x.clone()) for x in inputs for tp in ways]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    problems, kept = [], []
    for seed in range(REPLAYS):
        parts = [summands(size, shape, torch.bfloat16, seed) for shape in shapes]
        for x, every in zip(inputs, parts, strict=True):
            x.copy_(every[rank])
        graph.replay()
        for i, output in enumerate(outputs):
            problems.append(wrong(output, parts[i // len(ways)], exact=i % len(ways) < 2 or size == 2))
        kept += [output.clone() for output in outputs]
    return {"wrong": [text for text in problems if text], "bits": digest(kept)}


def gathers(groups: RankGroups) -> list[str]:
    """Gathers every way along every dimension, eagerly and in a graph; returns what went wrong."""
    rank, size = groups.tp.rank, groups.tp.size
    cases = [(torch.float32, (1, 64)), (torch.float32, (5, 33)), (torch.bfloat16, (3, 2, 70)), (torch.bfloat16, (3, 5))]
    cases += [
        (torch.int64, (2, 7)),
        (torch.bfloat16, (1, 3)),
        (torch.bfloat16, (1, 64128)),
        (torch.bfloat16, (77, 16032)),
    ]
    problems = []
    for way in ("one", "nccl"):
        tp = communicator(groups, way)
        for dtype, shape in cases:
            for seed, dim in enumerate((*range(len(shape)), -1)):
                parts = [(100 * part).to(dtype) for part in summands(size, shape, torch.float32, seed)]
                if not torch.equal(tp.all_gather(parts[rank], dim), torch.cat(parts, dim)):
                    problems.append(f"{way} {dtype} {shape} {dim}")
    return problems + gathers_recorded(groups)


def gathers_recorded(groups: RankGroups) -> list[str]:
    """Gathers between sums of one CUDA graph, which share its slots, replayed with other inputs each time."""
    rank, size, tp = groups.tp.rank, groups.tp.size, communicator(groups, "one")
    shapes = ((1, 4096), (16, 8192), (5, 2048))
    inputs = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]

    def run() -> list[Tensor]:
        return [tp.all_gather(tp.all_reduce(x.clone()) + x) for x in inputs]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    problems = []
    for seed in range(REPLAYS):
        parts = [summands(size, shape, torch.bfloat16, seed) for shape in shapes]
        for x, every in zip(inputs, parts, strict=True):
            x.copy_(every[rank])
        graph.replay()
        for output, every in zip(outputs, parts, strict=True):
            total = torch.stack(every).float().sum(0).bfloat16()
            if not torch.equal(output, torch.cat([total + part for part in every], -1)):
                problems.append(f"replay {seed} {tuple(output.shape)}")
    return problems


def everything(groups: RankGroups) -> dict[str, Any]:
    return {task.__name__: task(groups) for task in (sums, norms, graphs, gathers)}


def messages(groups: RankGroups) -> list[float]:
    """Down the pipeline on the GPU, back over the host."""
    mapping = groups.mapping
    x = torch.full((4, 8), float(mapping.tp_rank), device="cuda")
    if mapping.pp_rank > 0:
        groups.receive(x, mapping.rank - mapping.tp_size).wait()
    x += 10.0
    last = mapping.pp_rank == mapping.pp_size - 1
    if not last:
        groups.send(x, mapping.rank + mapping.tp_size).wait()
    torch.cuda.synchronize()
    answer = x[:, 0].cpu()
    if last:
        groups.host_send(answer, mapping.tp_rank).wait()
    if mapping.pp_rank == 0:
        groups.host_receive(answer, mapping.rank + (mapping.pp_size - 1) * mapping.tp_size).wait()
    return [answer[0].item(), float(groups.agree_min(50 - mapping.rank))]


def killed(groups: RankGroups, way: str, call: str = "all_reduce", *, recorded: bool = False) -> list[float]:
    """Rank 1 is killed, then rank 0 aborts and closes; returns the seconds that its GPU, and closing, took."""
    x = torch.ones(1, 4096, device="cuda")
    tp = communicator(groups, way)
    run: Callable[[], Any] = functools.partial(getattr(tp, call), x)
    graph = torch.cuda.CUDAGraph()
    run()
    torch.cuda.synchronize()
    if recorded:
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    if groups.mapping.rank == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    run()
    threading.Timer(2.0, groups.abort).start()
    start = time.monotonic()
    torch.cuda.synchronize()
    waited_s = time.monotonic() - start
    try:
        groups.check()
    except CommunicationError:
        graph.reset()
        start = time.monotonic()
        groups.close()
        return [waited_s, time.monotonic() - start]
    return []


def killed_in_kernel(groups: RankGroups) -> list[float]:
    return killed(groups, "two")


def killed_in_nccl(groups: RankGroups) -> list[float]:
    return killed(groups, "nccl")


def killed_in_gather(groups: RankGroups) -> list[float]:
    return killed(groups, "one", "all_gather")


def killed_in_recorded_nccl(groups: RankGroups) -> list[float]:
    return killed(groups, "nccl", "all_gather", recorded=True)


def killed_in_links(groups: RankGroups) -> list[float]:
    """Two communicators wait for rank 1, which is killed: sends up, and what comes down on another stream."""
    if groups.mapping.rank == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    x, y = torch.ones(1 << 24, device="cuda"), torch.ones(4096, device="cuda")  # more than NCCL takes ahead; a little
    groups.send(x, 1).wait()
    with torch.cuda.stream(torch.cuda.Stream()):
        groups.receive(y, 1).wait()
    threading.Timer(2.0, groups.abort).start()
    start = time.monotonic()
    torch.cuda.synchronize()
    waited_s = time.monotonic() - start
    start = time.monotonic()
    groups.close()
    return [waited_s, time.monotonic() - start]


def main() -> None:
    task, world, tp, rank, port = sys.argv[1], *map(int, sys.argv[2:6])
    torch.cuda.set_device(rank)
    mapping = Mapping(world_size=world, tp_size=tp, pp_size=world // tp, rank=rank)
    store = reach_store("127.0.0.1", port, TIMEOUT_S)
    groups = RankGroups.join(mapping, store, device=f"cuda:{rank}", timeout_s=TIMEOUT_S)
    answer = globals()[task](groups)
    if "killed" not in task:
        groups.agree_min(0)  # no rank frees its memory while another still writes there
        groups.close()
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
