"""Groups of ranks on CPUs: sums, messages, and what happens when a rank dies, stops or never comes."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support import rank_process
from tests.support.rank_launch import answers, ranks
from tests.support.warm_python import WarmPython
from tests.support.worker_crews import wait_for

from lamella_core.errors import CommunicationError
from lamella_core.mapping import Mapping
from lamella_executor.distributed.gloo import LARGEST_EXCHANGE_BYTES
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.store import host_store


@pytest.fixture(scope="module")
def python() -> Iterator[WarmPython]:
    """Starts ranks that have imported what they need."""
    python = WarmPython("tests.support.rank_process")
    yield python
    python.close()


@pytest.mark.parametrize("world", [2, 4])
def test_sums_have_equal_bits_on_all_ranks(world, python):
    got = answers("sums", world, world, python=python)
    assert all(answer == got[0] for answer in got)
    cases = [(dtype, size) for dtype in rank_process.DTYPES for size in rank_process.SIZES]
    for (dtype, size), values in zip(cases, got[0], strict=True):
        parts = torch.stack([rank_process.summands(size, dtype, rank).double()[:20] for rank in range(world)])
        exact, magnitude = parts.sum(0), parts.abs().sum(0)
        # summed in float32, then rounded once
        bound = 1.5 * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((torch.tensor(values[:-1], dtype=torch.float64) - exact).abs() <= bound).all()
    sizes = [size * dtype.itemsize for dtype, size in cases]
    assert min(sizes) < LARGEST_EXCHANGE_BYTES < max(sizes)  # both ways were taken


def test_gathers_along_any_dimension(python):
    got = answers("gathers", 2, 2, python=python)
    expected = []
    for rows in (0, 1, 3):
        parts = [torch.arange(rows * 2, dtype=torch.float32).view(rows, 2) + 100 * rank for rank in (0, 1)]
        expected += [torch.cat(parts, -1).tolist(), torch.cat(parts, 0).tolist()]
    assert got == [expected, expected]


def test_tensor_groups_sum_apart_and_messages_reach_any_rank(python):
    totals, messages = zip(*answers("sums_and_messages", 4, 2, python=python), strict=True)
    assert totals[0] == totals[1] and totals[2] == totals[3] and totals[0] != totals[2]
    assert list(messages) == [[10.0 * r, 10.0 * r + 1, -1.0 - r, 47.0] for r in (3, 0, 1, 2)]


def test_killed_peer_raises_at_once(python):
    first, second, third = answers("killed", 3, 3, python=python)
    assert "failed after" in first and "failed after" in second and third is None


def test_stopped_peer_raises_after_the_timeout(python):
    with ranks("stopped", 2, 2, python=python) as (_, processes):
        start = time.monotonic()
        answer = json.loads(processes[0].communicate(timeout=60)[0])
        assert "Timed out waiting 1500ms" in answer
        assert processes[1].poll() is None and time.monotonic() - start < 30.0


@pytest.mark.parametrize("size", [8, 70_000], ids=["small", "large"])
def test_abort_ends_a_wait_from_another_thread(size, python):
    with ranks("stopped", 2, 2, first=1, python=python) as (store, processes):
        groups = RankGroups.join(Mapping(world_size=2, tp_size=2), store, device="cpu", timeout_s=60.0)
        state = Path(f"/proc/{processes[0].pid}/stat")
        assert wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
        timer = threading.Timer(0.3, groups.abort)
        timer.start()
        start = time.monotonic()
        with pytest.raises(CommunicationError):
            groups.tp.all_reduce(torch.ones(size))
        with pytest.raises(CommunicationError):
            groups.tp.all_reduce(torch.ones(size))
        with pytest.raises(CommunicationError, match="aborted"):
            groups.check()
        assert time.monotonic() - start < 5.0
        timer.join()
        groups.close()


def test_close_leaves_no_thread_and_no_file(python):
    def held():
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def once():
        with ranks("sums", 2, 2, first=1, python=python) as (store, processes):
            groups = RankGroups.join(Mapping(world_size=2, tp_size=2), store, device="cpu", timeout_s=20.0)
            rank_process.sums(groups)
            assert processes[0].wait(30) == 0
            groups.close()

    once()  # what PyTorch keeps for good
    before = held()
    once()
    deadline = time.monotonic() + 5.0
    while held() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held() == before


def test_rank_that_never_comes_is_named():
    store = host_store()
    with pytest.raises(CommunicationError, match="missing: rank1"):
        RankGroups.join(Mapping(world_size=2, tp_size=2), store, device="cpu", timeout_s=0.2)


def test_joining_can_be_given_up():
    stop = threading.Event()
    stop.set()
    with pytest.raises(CommunicationError, match="given up"):
        RankGroups.join(Mapping(world_size=2, tp_size=2), host_store(), device="cpu", timeout_s=60.0, stop=stop)


def test_two_engines_of_one_process_do_not_meet(python):
    """Their ranks join through stores of their own, in any order."""
    with (
        ranks("messages", 2, 1, first=1, python=python) as (one, _),
        ranks("messages", 2, 1, first=1, python=python) as (other, _),
    ):
        both = [RankGroups.join(Mapping(2, 0, pp_size=2), s, device="cpu", timeout_s=20.0) for s in (other, one)]
        assert [rank_process.messages(groups) for groups in reversed(both)] == [[10.0, 11.0, -2.0, 49.0]] * 2
        for groups in both:
            groups.close()


def test_single_rank_needs_no_connection():
    groups = RankGroups.single()
    x = torch.ones(3)
    assert groups.tp.size == 1 and groups.tp.all_reduce(x) is x and groups.agree_min(7) == 7
    with pytest.raises(CommunicationError, match="alone"):
        groups.send(x, 0)
    groups.abort()
    groups.close()
