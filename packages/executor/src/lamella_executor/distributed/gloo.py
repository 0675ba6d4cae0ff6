"""Groups of CPU processes: tensors travel over TCP through gloo, between process group objects of their own.

No default process group is made or used, so several engines of one process do not meet.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from lamella_core.errors import CommunicationError

LARGEST_EXCHANGE_BYTES = 1 << 18  # more is reduced around a ring: less traffic, but more and slower steps
_HALVES = (torch.bfloat16, torch.float16)
_DIRECT, _ABORT = 0xFFFE, 0xFFFF  # tags of messages: of collectives made of them; of one that nobody sends

T = TypeVar("T")


class GlooWork:
    """A message under way. Keep it until `wait` has returned: it owns what keeps the tensor's memory in use."""

    def __init__(self, work: Any, what: str) -> None:
        self._work = work
        self._what = what

    def wait(self) -> None:
        """Returns when the tensor has been received or may be written again.

        Raises:
            CommunicationError: a peer died, fell silent for the group's timeout, or the group was aborted.
        """
        _checked(self._what, self._work.wait)


class GlooGroup:
    """The ranks of one group, each connected to each other.

    Args:
        store: where they meet; each group needs a name of its own.
        name: of the group.
        ranks: of the engine, in the group's order.
        rank: this one, an index into ``ranks``.
        address: of this machine, on which to listen and from which to connect.
        timeout_s: after which a silent peer counts as failed.

    Raises:
        CommunicationError: a peer did not connect in time.
    """

    def __init__(
        self, store: Store, name: str, ranks: Sequence[int], rank: int, *, address: str, timeout_s: float
    ) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank
        self.size = len(self.ranks)
        options: Any = getattr(ProcessGroupGloo, "_Options")()  # noqa: B009 - PyTorch's stubs leave it out
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1  # only large sums run on it
        self._group: Any = _checked(
            "connecting", lambda: ProcessGroupGloo(PrefixStore(name, store), rank, self.size, options)
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """Returns the sum over the ranks, with equal bits on all of them; large sums replace x.

        16-bit numbers are summed in float32 and rounded once.
        """
        if not x.numel():
            return x
        if x.nbytes <= LARGEST_EXCHANGE_BYTES:
            return torch.sum(self._exchange(x), 0, dtype=x.dtype)
        total = x.float() if x.dtype in _HALVES else x.contiguous()
        _checked("all_reduce", lambda: self._group.allreduce([total]).wait())
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Returns the ranks' tensors side by side along ``dim``; for single rows nothing is copied twice."""
        dim %= x.dim()
        return self._exchange(x).movedim(0, dim).flatten(dim, dim + 1)

    def rms_norm_of_sum(self, *arguments: Any) -> None:
        """Summing takes far longer than another kernel's call: there is nothing to fuse."""
        return

    def agree_min(self, value: int) -> int:
        """Returns the least of the ranks' values."""
        return int(self._exchange(torch.tensor([value], dtype=torch.int64)).min())

    def send(self, x: Tensor, rank: int, tag: int = 0) -> GlooWork:
        """Sends x to a rank of the group; messages of one tag arrive in order."""
        what = f"sending to rank {self.ranks[rank]}"
        return GlooWork(_checked(what, lambda: self._group.send([x.contiguous()], rank, tag)), what)

    def receive(self, x: Tensor, rank: int, tag: int = 0) -> GlooWork:
        """Receives into x (contiguous; as many bytes as were sent) from a rank of the group."""
        what = f"receiving from rank {self.ranks[rank]}"
        return GlooWork(_checked(what, lambda: self._group.recv([x], rank, tag)), what)

    def _exchange(self, x: Tensor) -> Tensor:
        """Returns the ranks' tensors [size, *x.shape] in rank order, sent straight from each to each.

        Two messages between a pair take half the time of gloo's own collectives, which run on another thread.
        """
        every = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        if not x.numel():
            return every
        every[self.rank] = x
        others = [rank for rank in range(self.size) if rank != self.rank]
        work = [self.receive(every[rank], rank, _DIRECT) for rank in others]
        work += [self.send(every[self.rank], rank, _DIRECT) for rank in others]
        for each in work:
            each.wait()
        return every

    def abort(self) -> None:
        """Makes whatever waits in this group raise, here and in the peers; from any thread.

        A receive that times out breaks all connections of a gloo group, and breaking them is the only way to end its
        other operations: so one is started that nobody answers.
        """
        peer = (self.rank + 1) % self.size
        try:
            self._group.recv([torch.empty(1)], peer, _ABORT).wait(timedelta(milliseconds=1))
        except RuntimeError:
            return

    def close(self) -> None:
        """Ends connections and threads; nothing may use the group afterwards."""
        self._group = None


def _checked(what: str, call: Callable[[], T]) -> T:
    start = time.monotonic()
    try:
        return call()
    except RuntimeError as error:  # torch's DistError and all that gloo throws
        waited_s = time.monotonic() - start
        raise CommunicationError(f"{what} failed after {waited_s:.1f} s: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """Returns gloo's message without the place in its source and its advice."""
    text = str(error).partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", text).partition(". This is typically")[0]
