"""One rank of a test of `RankGroups`, a process of its own.

    python -m tests.support.rank_process TASK WORLD_SIZE TP_SIZE RANK PORT

runs the function named TASK with this rank's groups and prints what it returns as one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

from lamella_core.errors import CommunicationError
from lamella_core.mapping import Mapping
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.store import reach_store

TIMEOUT_S = 20.0
SIZES = (1, 7, 1000, 70_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def summands(size: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank + 1)).to(dtype)


def sums(groups: RankGroups) -> list[list[float]]:
    """Sums of every size and dtype over the tensor group, as the bits' checksum and some values."""
    answers = []
    for dtype in DTYPES:
        for size in SIZES:
            total = groups.tp.all_reduce(summands(size, dtype, groups.mapping.rank))
            assert total.dtype is dtype
            answers.append([float(v) for v in total[:20].double()] + [total.double().abs().sum().item()])
    return answers


def gathers(groups: RankGroups) -> list[object]:
    answers: list[object] = []
    for rows in (0, 1, 3):
        x = torch.arange(rows * 2, dtype=torch.float32).view(rows, 2) + 100 * groups.mapping.rank
        answers += [groups.tp.all_gather(x).tolist(), groups.tp.all_gather(x, dim=0).tolist()]
    return answers


def messages(groups: RankGroups) -> list[float]:
    """A ring: each rank sends two tensors and a host tensor on, and returns what it got and the ranks' minimum."""
    rank, size = groups.mapping.rank, groups.mapping.world_size
    after, before = (rank + 1) % size, (rank - 1) % size
    got = [torch.empty(3) for _ in range(3)]
    work = [groups.send(torch.full((3,), 10.0 * rank), after), groups.host_send(torch.full((3,), -1.0 - rank), after)]
    work.append(groups.send(torch.full((3,), 10.0 * rank + 1), after))
    work += [groups.host_receive(got[2], before), groups.receive(got[0], before), groups.receive(got[1], before)]
    for each in work:
        each.wait()
    return [x[1].item() for x in got] + [float(groups.agree_min(50 - rank))]


def sums_and_messages(groups: RankGroups) -> list[object]:
    return [sums(groups), messages(groups)]


def killed(groups: RankGroups) -> str:
    """The last rank is killed while the others wait for its summand."""
    if groups.mapping.rank == groups.mapping.world_size - 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return _failure(groups)


def stopped(groups: RankGroups) -> str:
    """The last rank stops; the others only have their timeout."""
    if groups.mapping.rank == groups.mapping.world_size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return _failure(groups)


def _failure(groups: RankGroups) -> str:
    try:
        groups.tp.all_reduce(torch.ones(8))
    except CommunicationError as error:
        return str(error)
    return ""


def main() -> None:
    task, world, tp, rank, port = sys.argv[1], *map(int, sys.argv[2:6])
    torch.set_num_threads(1)
    mapping = Mapping(world_size=world, tp_size=tp, pp_size=world // tp, rank=rank)
    store = reach_store("127.0.0.1", port, TIMEOUT_S)
    timeout_s = 1.5 if task == "stopped" else TIMEOUT_S
    groups = RankGroups.join(mapping, store, device="cpu", timeout_s=timeout_s)
    answer = globals()[task](groups)
    groups.close()
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # PyTorch's part in an interpreter's end takes longer than most tasks


if __name__ == "__main__":
    main()
