"""Groups of GPUs without a GPU: which way a message takes, and how communicators end, against a stand-in for NCCL."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lamella_core.errors import CommunicationError
from lamella_executor.distributed import gpu, nccl, nccl_library
from lamella_executor.distributed.gpu import CudaCommunicator, GpuGroups, SumLimits
from lamella_executor.distributed.nccl import NcclGroup

pytest.importorskip("triton", reason="GPU kernels need triton")

CPU = torch.device("cpu")


class FakeNccl:
    """NCCL's functions; communicators are numbers from 1.

    Attributes:
        flagged: communicators whose kernels were told to return.
        may_free: what ncclCommAbort waits for before it frees the communicator given.
        call: what the collectives do, given the communicator; returns an ncclResult_t.
        state: the result of ncclCommInitRankConfig.
    """

    def __init__(self) -> None:
        self.made = 0
        self.flagged: set[int] = set()
        self.freed: list[int] = []
        self.may_free: Callable[[int], bool] = lambda comm: True
        self.call: Callable[[int], int] = lambda comm: 0
        self.state = 0

    def ncclGetUniqueId(self, unique_id: Any) -> int:
        return 0

    def ncclGetErrorString(self, result: int) -> bytes:
        return b"it failed"

    def ncclCommInitRankConfig(self, comm: Any, *arguments: Any) -> int:
        self.made += 1
        comm._obj.value = self.made
        return self.state

    def ncclCommGetAsyncError(self, comm: ctypes.c_void_p, state: Any) -> int:
        return 0  # as it was

    def ncclAllGather(self, *arguments: Any) -> int:
        return self.call(arguments[-2].value)

    def ncclSend(self, *arguments: Any) -> int:
        return self.call(arguments[-2].value)

    def ncclCommAbort(self, comm: ctypes.c_void_p) -> int:
        number = int(comm.value or 0)
        self.flagged.add(number)
        wait_until(lambda: self.may_free(number))
        self.freed.append(number)
        return 0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20.0
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)


@pytest.fixture
def library(monkeypatch):
    fake = FakeNccl()
    for module in (nccl, nccl_library):
        monkeypatch.setattr(module, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield fake
    fake.may_free = lambda comm: True  # for threads that still wait


def make_group(stop: threading.Event | None = None) -> NcclGroup:
    store: Any = SimpleNamespace(set=lambda key, value: None)
    return NcclGroup(store, "tp0", 0, 2, device=CPU, deadline=time.monotonic() + 20.0, stop=stop)


def gather(group: NcclGroup) -> None:
    group.all_gather(torch.zeros(2), torch.zeros(2, 2))


class FakeMemory:
    """Shared memory that counts what is done to it."""

    def __init__(self) -> None:
        self.peers = object()
        self.done: list[str] = []

    def abort(self) -> None:
        self.done.append("abort")

    def close(self) -> None:
        self.done.append("close")


def make_groups(count: int, memory: Any = None) -> GpuGroups:
    groups = GpuGroups(CPU, gpu.SingleRank(), [make_group() for _ in range(count)], [], 0)
    groups._memory = memory
    return groups


def test_abort_ends_a_call_that_hangs_in_nccl(library, monkeypatch):
    """A launch that waits for a kernel which waits for a dead peer."""
    monkeypatch.setattr(nccl, "_CALL_PATIENCE_S", 0.05)
    group, hangs = make_group(), threading.Event()

    def hang(comm: int) -> int:
        hangs.set()
        wait_until(lambda: comm in library.flagged)
        return 0

    library.call = hang
    caller = threading.Thread(target=gather, args=(group,))
    caller.start()
    assert hangs.wait(10.0)
    group.abort()
    caller.join(10.0)
    assert not caller.is_alive() and group.await_end(10.0) and library.freed == [1]
    with pytest.raises(CommunicationError, match="aborted"):
        gather(group)


def test_calls_raise_while_nccl_still_waits_for_recorded_graphs(library):
    group, graphs_gone = make_group(), threading.Event()
    library.may_free = lambda comm: graphs_gone.is_set()
    group.abort()
    wait_until(lambda: 1 in library.flagged)
    with pytest.raises(CommunicationError, match="aborted"):  # so that the thread which holds the graphs lets them go
        gather(group)
    assert not group.await_end(0.02)
    graphs_gone.set()
    assert group.await_end(10.0)


def test_abort_happens_once(library):
    group = make_group()
    for _ in range(3):
        group.abort()
    assert group.await_end(10.0)
    group.abort()
    assert library.freed == [1]


def test_all_communicators_are_told_before_one_is_freed(library):
    """Freeing one waits for the device, so for the kernels of the others."""
    memory = FakeMemory()
    groups = make_groups(3, memory)
    library.may_free = lambda comm: len(library.flagged) == 3
    started = time.monotonic()
    groups.abort()
    groups.close()
    assert sorted(library.freed) == [1, 2, 3] and memory.done == ["abort", "close"]
    assert time.monotonic() - started < gpu._FREE_TIMEOUT_S


def test_what_cannot_be_freed_is_left_behind(library, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "_FREE_TIMEOUT_S", 0.05)
    memory, let = FakeMemory(), threading.Event()
    groups = make_groups(1, memory)
    library.may_free = lambda comm: let.is_set()
    with caplog.at_level(logging.WARNING):
        groups.close()
    assert "did not come free" in caplog.text
    assert memory.done == ["abort"]  # its kernels are told too; memory that they may use stays
    let.set()  # what was in the way goes later
    wait_until(lambda: "close" in memory.done)
    assert memory.done == ["abort", "close"] and library.freed == [1]


def test_a_device_that_never_comes_idle_is_aborted(library, monkeypatch):
    monkeypatch.setattr(gpu, "_FREE_TIMEOUT_S", 0.2)
    memory = FakeMemory()
    groups = make_groups(2, memory)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: wait_until(lambda: len(library.flagged) == 2))
    groups.close()
    wait_until(lambda: "close" in memory.done)
    assert memory.done == ["abort", "close"] and sorted(library.freed) == [1, 2]


def test_connecting_is_given_up(library):
    library.state = nccl_library.IN_PROGRESS
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(CommunicationError, match="connecting through NCCL was given up"):
        make_group(stop)
    assert library.freed == [1]


def test_first_messages_are_given_up(library, monkeypatch):
    """A rank that died after it connected: the device waits for it for ever."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: False))
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(CommunicationError, match="first messages between GPUs were given up"):
        gpu._await_device(CPU, time.monotonic() + 20.0, stop)
    with pytest.raises(CommunicationError, match="given up"):
        gpu._await_device(CPU, time.monotonic(), None)


def test_failed_call_ends_the_communicator(library):
    group = make_group()
    library.call = lambda comm: 3
    with pytest.raises(CommunicationError, match="ncclAllGather failed: NCCL says 'it failed'"):
        gather(group)
    assert group.await_end(10.0) and library.freed == [1]


class FakeGroup:
    """NCCL as a communicator of two ranks sees it; both have the same x."""

    rank, size = 1, 2

    def __init__(self) -> None:
        self.num_calls = 0

    def all_gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self.num_calls += 1
        out.copy_(torch.stack([x, x]))


@pytest.mark.parametrize(
    ("x", "dim", "is_ours"),
    [
        (torch.arange(8.0).view(2, 4), -1, True),
        (torch.arange(8.0).view(4, 2).T, -1, True),  # not contiguous
        (torch.arange(8.0).view(2, 4), 0, True),
        (torch.arange(10.0).view(2, 5), -1, False),  # larger than the limit
        (torch.arange(6.0).view(2, 3).bfloat16(), -1, True),  # rows of a word and a half
        (torch.arange(6.0).view(2, 3).bfloat16(), 0, True),
        (torch.arange(3.0).view(1, 3).bfloat16(), -1, True),
        (torch.arange(15.0).view(1, 5, 3).bfloat16()[:, 1:4], 1, True),  # starts inside a word
    ],
)
def test_gathers_take_the_shared_memory_where_they_can(x, dim, is_ours, monkeypatch):
    from lamella_core.kernels.triton import all_gather

    calls, group, memory = [], FakeGroup(), FakeMemory()

    def kernel(x: torch.Tensor, dim: int, peers: object) -> torch.Tensor:
        assert all_gather.can_gather(x, dim) and peers is memory.peers
        calls.append(dim)
        return torch.cat([x, x], dim)

    monkeypatch.setattr(all_gather, "gather", kernel)
    any_group: Any = group
    shared: list[Any] = [memory, None]
    for used in shared:
        tp = CudaCommunicator(any_group, used, SumLimits(0, 0, 0, 32))
        calls.clear()
        group.num_calls = 0
        assert torch.equal(tp.all_gather(x, dim), torch.cat([x, x], dim))
        expected = int(is_ours and used is not None)
        assert (len(calls), group.num_calls) == (expected, 1 - expected)


def test_an_empty_gather_needs_nobody():
    group: Any = FakeGroup()
    assert CudaCommunicator(group, None).all_gather(torch.zeros(0, 4)).shape == (0, 8)
    assert group.num_calls == 0
