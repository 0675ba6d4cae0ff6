"""StateSlots: who holds which slot of the recurrent states, and copies that the next step makes before its forward.

A sequence that computes has one slot, whatever its length, and nobody shares it. Like blocks, slots change hands when
steps are planned: one that a step in flight still writes may be handed out at once, for its next owner begins, in a
later step, with states of zero or with a copy.
"""

from __future__ import annotations


class StateSlots:
    """The free list, and pending (source, destination) copies.

    Copies are made in the order of their requests. A source is a sequence that a step has computed, so it is never the
    destination of another pending copy; it may be given back, and become a destination, behind its own copies.

    Args:
        num_slots: slots in total, ids 0 .. num_slots - 1.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # stack; low ids first
        self._is_free = bytearray(b"\1" * num_slots)
        self._sources: dict[int, int] = {}  # destination -> source, in the order of the requests

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Hands out a slot, whose contents mean nothing.

        Raises:
            RuntimeError: all are taken; the scheduler admits no more sequences than there are slots.
        """
        if not self._free:
            raise RuntimeError(f"all {self.num_slots} slots of recurrent states are taken")
        slot = self._free.pop()
        self._is_free[slot] = 0
        return slot

    def fork(self, source: int) -> int:
        """Hands out a slot that will hold a copy of another one's states."""
        destination = self.take()
        self._sources[destination] = source
        return destination

    def release(self, slot: int) -> None:
        """Takes a slot back; a copy into it that was not made yet is forgotten.

        Raises:
            RuntimeError: nobody holds it.
        """
        if self._is_free[slot]:
            raise RuntimeError(f"slot {slot} of the recurrent states was released more often than taken")
        self._is_free[slot] = 1
        self._free.append(slot)
        self._sources.pop(slot, None)

    def take_copies(self) -> list[tuple[int, int]]:
        """Returns the (source, destination) copies to carry out, in this order, before the forward pass."""
        copies = [(source, destination) for destination, source in self._sources.items()]
        self._sources.clear()
        return copies
