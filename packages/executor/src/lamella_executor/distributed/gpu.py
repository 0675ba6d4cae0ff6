"""Groups of GPUs: NCCL for any message, kernels of our own where they are quicker."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import Store
from torch.nn import functional

from lamella_core.context import Communicator, SingleRank
from lamella_core.errors import CommunicationError
from lamella_core.kernels import triton as triton_kernels
from lamella_core.kernels.triton.exchange import Peers
from lamella_core.mapping import Mapping
from lamella_executor.distributed.gloo import GlooGroup
from lamella_executor.distributed.nccl import NcclGroup
from lamella_executor.distributed.peer_memory import PeerMemory

logger = logging.getLogger(__name__)

_FREE_TIMEOUT_S = 3.0  # for the device to come idle and all communicators to be freed
_WARM_UP_BYTES = (1 << 10, 1 << 18, 1 << 22, 1 << 24)  # of sums and gathers for which NCCL connects differently


@dataclass(frozen=True)
class SumLimits:
    """Largest messages of a rank, in bytes, that our kernels exchange; what is larger goes through NCCL.

    ``benchmarks/gpu_all_reduce.py`` measures up to where they are quicker.
    """

    one_shot: int
    two_shot: int
    fused: int  # with the norm after the sum
    gather: int


# Two H200s, bf16 rows of 4096 and 8192, microseconds in one exchange, in two and through NCCL: 8 KiB 2.4, 3.3, 12.3;
# 64 KiB 2.7, 3.7, 12.9; 1 MiB 9.9, 10.3, 19.5; 2 MiB 16, 19, 31. Fused with the norm, and NCCL then: 2 MiB 18.7, 31;
# 4 MiB 32, 38. Above 64 KiB one exchange took 0.2 to 0.9 ms in a third of the cases, for a reason not found; two never.
# Gathers are mostly of a step's logits: 16 MiB are 128 rows of half a vocabulary of 128K in bf16. What NCCL does not
# take part in, it cannot hold up when a peer has died.
_LIMITS = {
    2: SumLimits(1 << 16, 1 << 21, 1 << 22, 1 << 24),
    3: SumLimits(1 << 16, 1 << 21, 1 << 20, 1 << 23),
    4: SumLimits(1 << 16, 1 << 21, 1 << 20, 1 << 23),
}
_MANY = SumLimits(1 << 16, 1 << 20, 1 << 16, 1 << 21)  # ranks: every one writes to every other


class CudaCommunicator:
    """The tensor-parallel group of GPUs that layers use; what it does is enqueued on the current CUDA stream.

    Args:
        nccl: of the same ranks.
        memory: that they share; None: NCCL does everything.
        limits: up to which sizes the shared memory is used; None: those for the number of ranks.
    """

    def __init__(self, nccl: NcclGroup, memory: PeerMemory | None, limits: SumLimits | None = None) -> None:
        self.rank, self.size = nccl.rank, nccl.size
        self._nccl = nccl
        self._memory = memory
        self._limits = limits or _LIMITS.get(nccl.size, _MANY)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Returns the sum over the ranks, with equal bits on all of them; large sums replace x."""
        if not x.numel():
            return x
        x = x.contiguous()
        small = self._small_sum(x)
        if small is not None:
            return small
        self._nccl.all_reduce(x, x)
        return x

    def _small_sum(self, x: Tensor) -> Tensor | None:
        if self._memory is None or x.nbytes > max(self._limits.one_shot, self._limits.two_shot):
            return None
        from lamella_core.kernels.triton import all_reduce
        from lamella_core.kernels.triton.exchange import can_sum

        if not can_sum(x):
            return None
        kernel = all_reduce.one_shot if x.nbytes <= self._limits.one_shot else all_reduce.two_shot
        return kernel(x, self._memory.peers)

    def rms_norm_of_sum(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        out_scale: Tensor | None = None,
        unit_offset: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """See `lamella_core.context.Communicator`; None where `all_reduce` does not take one exchange."""
        if self._memory is None or x.nbytes > self._limits.fused or not x.numel():
            return None
        from lamella_core.kernels.triton import all_reduce_norm

        peers = self._memory.peers
        if not all_reduce_norm.can_sum_and_norm(x, residual, weight, peers):
            return None
        scale = None if x.dtype is torch.float32 else out_scale
        return all_reduce_norm.sum_and_norm(x, residual, weight, eps, peers, scale, unit_offset)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Returns the ranks' tensors side by side along ``dim``; what NCCL gathers of several rows is copied twice."""
        dim %= x.dim()
        x = x.contiguous()
        if x.numel() and self._memory is not None and x.nbytes <= self._limits.gather:
            return self._small_gather(x, dim, self._memory.peers)
        every = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel():
            self._nccl.all_gather(x, every)
        return every.movedim(0, dim).flatten(dim, dim + 1)

    def _small_gather(self, x: Tensor, dim: int, peers: Peers) -> Tensor:
        from lamella_core.kernels.triton import all_gather

        if all_gather.can_gather(x, dim):
            return all_gather.gather(x, dim, peers)
        # Rows that are not of whole words: the ranks' tensors one after another, each filled up, then put in order.
        filled = functional.pad(x.view(-1), (0, -x.numel() % max(1, 4 // x.element_size())))
        every = all_gather.gather(filled, 0, peers).view(self.size, -1)[:, : x.numel()]
        return every.unflatten(1, x.shape).movedim(0, dim).flatten(dim, dim + 1)


class GpuWork:
    """A message enqueued on the current stream: what follows there comes after it, and there is nothing to wait for."""

    def wait(self) -> None:
        return


class GpuGroups:
    """What the GPU of one rank belongs to: its tensor-parallel group, and one group of all ranks for each direction.

    Sends to higher and to lower ranks go through communicators of their own, because one does one thing at a time.
    """

    def __init__(
        self, device: torch.device, tp: Communicator, nccl: list[NcclGroup], links: list[NcclGroup], rank: int
    ) -> None:
        self.tp = tp
        self._device = device
        self._nccl = nccl  # all communicators, those of the links too
        self._links = links  # to higher ranks, to lower ranks; none without a pipeline
        self._rank = rank
        self._memory: PeerMemory | None = None
        self._is_aborted = False

    @classmethod
    def join(
        cls,
        mapping: Mapping,
        store: Store,
        world: GlooGroup,
        *,
        device: torch.device,
        timeout_s: float,
        stop: threading.Event | None,
    ) -> GpuGroups:
        """Connects the GPUs of all ranks; see `RankGroups.join`."""
        deadline = time.monotonic() + timeout_s

        def connect(name: str, rank: int, size: int) -> NcclGroup:
            group = NcclGroup(store, name, rank, size, device=device, deadline=deadline, stop=stop)
            made.append(group)
            return group

        made: list[NcclGroup] = []
        groups = cls(device, SingleRank(), made, [], mapping.rank)
        try:
            if mapping.tp_size > 1:
                nccl = connect(f"tp{mapping.pp_rank}", mapping.tp_rank, mapping.tp_size)
                if triton_kernels.is_available():
                    groups._memory = PeerMemory.share(world, mapping.tp_group, device)
                groups.tp = CudaCommunicator(nccl, groups._memory)
                _warm_up(nccl)
                _await_device(device, deadline, stop)
            if mapping.pp_size > 1:
                groups._links += [connect(name, mapping.rank, mapping.world_size) for name in ("up", "down")]
                groups._warm_up_links(mapping)
                _await_device(device, deadline, stop)
        except BaseException:
            groups.abort()
            groups.close()
            raise
        return groups

    def _warm_up_links(self, mapping: Mapping) -> None:
        """Sends from each stage to the next and from the last to the first, which connects them."""
        tp, last = mapping.tp_size, mapping.pp_size - 1
        first_stage, last_stage = mapping.tp_rank, last * tp + mapping.tp_rank
        x = torch.zeros(8, device=self._device)
        if mapping.pp_rank > 0:
            self.receive(x, mapping.rank - tp)
        if mapping.pp_rank < last:
            self.send(x, mapping.rank + tp)
        if mapping.pp_rank == last:
            self.send(x, first_stage)
        if mapping.pp_rank == 0:
            self.receive(x, last_stage)

    def send(self, x: Tensor, rank: int) -> GpuWork:
        self._link(rank > self._rank).send(x.contiguous(), rank)
        return GpuWork()

    def receive(self, x: Tensor, rank: int) -> GpuWork:
        self._link(rank < self._rank).receive(x, rank)
        return GpuWork()

    def _link(self, is_upward: bool) -> NcclGroup:
        return self._links[0 if is_upward else 1]

    def abort(self) -> None:
        """Makes all kernels that wait for a peer return, from any thread; does not wait for it.

        All communicators are told before one is waited for: see `NcclGroup.abort`.
        """
        self._is_aborted = True
        if self._memory is not None:
            self._memory.abort()
        for group in self._nccl:
            group.abort()

    def close(self) -> None:
        """Waits for what is enqueued, unless aborted, and frees everything; CUDA graphs of its calls must be gone.

        What cannot be freed within seconds is left to a thread that goes on trying.
        """
        freeing = threading.Thread(target=self._free, name="lamella-free-gpu", daemon=True)
        freeing.start()
        freeing.join(_FREE_TIMEOUT_S)
        if freeing.is_alive() and not self._is_aborted:
            self.abort()
            freeing.join(_FREE_TIMEOUT_S)
        if freeing.is_alive():
            logger.warning(
                "GPU %s did not come free within %.0f s of its ranks' end; up to %d communicators of NCCL and their "
                "memory stay with this process until it does",
                self._device, _FREE_TIMEOUT_S, len(self._nccl),
            )  # fmt: skip

    def _free(self) -> None:
        if not self._is_aborted:
            torch.cuda.synchronize(self._device)
        for group in self._nccl:
            group.abort()
        for group in self._nccl:
            group.await_end(None)
        if self._memory is not None:
            self._memory.close()


def _warm_up(nccl: NcclGroup) -> None:
    """Lets NCCL make now what its calls would otherwise make while a CUDA graph is captured."""
    with torch.cuda.device(nccl.device):
        for num_bytes in _WARM_UP_BYTES:
            x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=nccl.device)
            nccl.all_reduce(x, x)
            part = torch.zeros(x.numel() // nccl.size, dtype=x.dtype, device=x.device)
            nccl.all_gather(part, x)


def _await_device(device: torch.device, deadline: float, stop: threading.Event | None) -> None:
    """Waits for what is enqueued on the current stream, which may wait for other ranks.

    Raises:
        CommunicationError: it was not done by the deadline, of `time.monotonic`, or ``stop`` was set.
    """
    with torch.cuda.device(device):
        done = torch.cuda.Event()
        done.record()
    while not done.query():
        if time.monotonic() > deadline or (stop is not None and stop.is_set()):
            raise CommunicationError("the first messages between GPUs were given up: not all ranks take part")
        time.sleep(0.0002)
