"""Host memory that the device reads and writes while the host goes on: packed inputs one way, sampled tokens the other.

A buffer is written again only after the transfer that used it last is complete, which an event tells.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # int32 values; keeps every section aligned for vector loads, whatever stands before it
RING = 3  # host buffers of each kind: one that is filled, one in flight, one in reserve


class _HostBuffer:
    """Pinned integers and the event after their last transfer; without a CUDA device transfers are immediate."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.tensor = torch.zeros(capacity, dtype=torch.int32, pin_memory=is_cuda)
        self.values: np.ndarray = self.tensor.numpy()
        self._event = torch.cuda.Event() if is_cuda else None

    def mark(self) -> None:
        """Notes that a transfer was enqueued on the current stream."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Waits until the last transfer is complete."""
        if self._event is not None:
            self._event.synchronize()


class Inbox:
    """Packed int32 input of one step after another, sent in one transfer each to the same place on the device."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self._ring = [_HostBuffer(capacity, device) for _ in range(RING)]
        self._target = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._turn = 0
        self._used = 0

    def begin(self) -> None:
        """Starts a step's input."""
        self._turn = (self._turn + 1) % RING
        self._ring[self._turn].wait()
        self._used = 0

    def fits(self, *counts: int) -> bool:
        """Whether sections of these sizes still fit."""
        return self._used + sum(_aligned(count) for count in counts) <= self.capacity

    def put(self, values: SequenceOf[int] | np.ndarray, count: int | None = None, fill: int = 0) -> Tensor:
        """Appends a section and returns where it will be on the device: [count] int32.

        Args:
            values: at most ``count``.
            count: its size; None: as many as there are values.
            fill: the rest of the section.
        """
        length = len(values)
        size = length if count is None else count
        start = self._used
        host = self._ring[self._turn].values
        host[start : start + length] = values
        if size > length:
            host[start + length : start + size] = fill
        return self.reserve(size)

    def reserve(self, count: int) -> Tensor:
        """Like `put`, but leaves the section's content to whoever packs the same sections again later."""
        start = self._used
        self._used = start + _aligned(count)
        if self._used > self.capacity:
            raise RuntimeError(f"a step needs {self._used} packed integers, its buffer holds {self.capacity}")
        return self._target[start : start + count]

    def send(self) -> None:
        """Enqueues the transfer."""
        buffer = self._ring[self._turn]
        self._target[: self._used].copy_(buffer.tensor[: self._used], non_blocking=True)
        buffer.mark()


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class SampledTokens:
    """The tokens that a step sampled, on their way to the host."""

    def __init__(self, buffer: _HostBuffer, count: int) -> None:
        self._buffer: _HostBuffer | None = buffer
        self._count = count
        self._tokens: list[int] = []

    def wait(self) -> list[int]:
        """Waits for the step; returns one token per row."""
        if self._buffer is not None:
            self._buffer.wait()
            self._tokens = self._buffer.values[: self._count].tolist()
            self._buffer = None
        return self._tokens


class Outbox:
    """Where steps leave their sampled tokens, on the device for the next step and in host memory for the engine."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._ring = [_HostBuffer(num_rows, device) for _ in range(RING)]
        self._pending: list[SampledTokens | None] = [None] * RING
        self._turn = 0

    def fetch(self, count: int) -> SampledTokens:
        """Enqueues the transfer of the first ``count`` tokens; older ones nobody took yet are taken first."""
        self._turn = (self._turn + 1) % RING
        previous, buffer = self._pending[self._turn], self._ring[self._turn]
        if previous is not None:
            previous.wait()
        if count:
            buffer.tensor[:count].copy_(self.tokens[:count], non_blocking=True)
        buffer.mark()
        taken = self._pending[self._turn] = SampledTokens(buffer, count)
        return taken
