"""The groups of one rank of one engine: its tensor-parallel group, and messages between any two ranks."""

from __future__ import annotations

import threading
import time
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from lamella_core.context import Communicator, SingleRank
from lamella_core.errors import CommunicationError
from lamella_core.mapping import Mapping
from lamella_executor.distributed.gloo import GlooGroup
from lamella_executor.distributed.store import await_keys

_STAGE, _HOST = 1, 2  # tags of messages: between the devices of ranks; of host tensors


class Work(Protocol):
    """A message under way; keep it until `wait` has returned."""

    def wait(self) -> None:
        """Returns when the tensor may be used again: by the CPU, or by what the current CUDA stream does next."""
        ...


class DeviceGroups(Protocol):
    """What GPUs add to the groups of CPUs."""

    tp: Communicator

    def send(self, x: Tensor, rank: int) -> Work: ...

    def receive(self, x: Tensor, rank: int) -> Work: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class RankGroups:
    """The groups of one rank, with their connections; made by `join` or `single`.

    Attributes:
        mapping: the rank's place.
        device: "cpu", or the rank's CUDA device ("cuda:0").
        tp: the tensor-parallel group, for layers.
    """

    def __init__(
        self, mapping: Mapping, device: str, world: GlooGroup | None, tp: Communicator, gpu: DeviceGroups | None
    ) -> None:
        self.mapping = mapping
        self.device = device
        self.tp = tp
        self._world = world
        self._gpu = gpu
        self._own = list(dict.fromkeys(group for group in (tp, world) if isinstance(group, GlooGroup)))
        self._is_aborted = False

    @classmethod
    def single(cls, device: str = "cpu") -> RankGroups:
        """Returns the groups of a rank that is alone."""
        return cls(Mapping(), device, None, SingleRank(), None)

    @classmethod
    def join(
        cls,
        mapping: Mapping,
        store: Store,
        *,
        device: str,
        timeout_s: float,
        address: str | None = None,
        stop: threading.Event | None = None,
    ) -> RankGroups:
        """Connects this rank with all others; every rank of the engine must call this.

        Args:
            mapping: its rank is this process's.
            store: of this engine alone, at all ranks the same (see `host_store`, `reach_store`).
            device: "cpu", or this rank's CUDA device.
            timeout_s: for all ranks to come, and later for a silent peer on the CPU.
            address: of this machine as the other ranks reach it; None: 127.0.0.1, all ranks are on one machine.
            stop: set by another thread to give up waiting for ranks.

        Raises:
            CommunicationError: not all ranks came.
        """
        if mapping.world_size == 1:
            return cls.single(device)
        store = PrefixStore("groups", store)
        store.set(f"rank{mapping.rank}", "")
        everyone = [f"rank{rank}" for rank in range(mapping.world_size)]
        await_keys(store, everyone, time.monotonic() + timeout_s, stop, "all ranks")
        address = address or "127.0.0.1"
        ranks = range(mapping.world_size)
        world = GlooGroup(store, "world", ranks, mapping.rank, address=address, timeout_s=timeout_s)
        if torch.device(device).type == "cpu":
            return cls(mapping, device, world, _cpu_tensor_group(mapping, store, world, address, timeout_s), None)
        from lamella_executor.distributed.gpu import GpuGroups

        try:
            gpu = GpuGroups.join(mapping, store, world, device=torch.device(device), timeout_s=timeout_s, stop=stop)
        except BaseException:
            world.close()
            raise
        return cls(mapping, device, world, gpu.tp, gpu)

    def agree_min(self, value: int) -> int:
        """Returns the least of all ranks' values; every rank must call this."""
        return value if self._world is None else self._world.agree_min(value)

    def send(self, tensor: Tensor, rank: int) -> Work:
        """Sends a tensor on the engine's device to a rank of the world; tensors to one rank arrive in order.

        On a GPU the current stream waits until the receiver takes it, so two ranks that both send first never end.
        """
        return self._world_group().send(tensor, rank, _STAGE) if self._gpu is None else self._gpu.send(tensor, rank)

    def receive(self, tensor: Tensor, rank: int) -> Work:
        """Receives into a tensor on the engine's device, of the shape and dtype that ``rank`` sends."""
        if self._gpu is None:
            return self._world_group().receive(tensor, rank, _STAGE)
        return self._gpu.receive(tensor, rank)

    def host_send(self, tensor: Tensor, rank: int) -> Work:
        """Sends a CPU tensor to a rank of the world, in an order of its own beside `send`."""
        return self._world_group().send(tensor, rank, _HOST)

    def host_receive(self, tensor: Tensor, rank: int) -> Work:
        """Receives into a CPU tensor of the shape and dtype that ``rank`` sends with `host_send`."""
        return self._world_group().receive(tensor, rank, _HOST)

    def check(self) -> None:
        """Raises CommunicationError once the groups are aborted: what a GPU computed since may be wrong."""
        if self._is_aborted:
            raise CommunicationError("the ranks' groups were aborted")

    def abort(self) -> None:
        """Ends all communication, from any thread: whatever waits in it raises soon, here and in the peers.

        On a GPU kernels return with wrong sums, and `check` tells.
        """
        self._is_aborted = True
        if self._gpu is not None:
            self._gpu.abort()
        for group in self._own:
            group.abort()

    def close(self) -> None:
        """Ends the connections and their threads. All messages must have been waited for.

        On a GPU this waits for what is enqueued, unless the groups were aborted. The GPUs of other ranks may still read
        and write this one's memory until they have done their last step, so ranks close after the last result is known.
        """
        if self._gpu is not None:
            self._gpu.close()
        for group in self._own:
            group.close()

    def _world_group(self) -> GlooGroup:
        if self._world is None:
            raise CommunicationError("a rank that is alone has nobody to send to or receive from")
        return self._world


def _cpu_tensor_group(
    mapping: Mapping, store: Store, world: GlooGroup, address: str, timeout_s: float
) -> Communicator:  # fmt: skip
    if mapping.tp_size == 1:
        return SingleRank()
    if mapping.pp_size == 1:
        return world
    name = f"tp{mapping.pp_rank}"
    return GlooGroup(store, name, mapping.tp_group, mapping.tp_rank, address=address, timeout_s=timeout_s)
