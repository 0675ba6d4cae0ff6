"""SlotTable: which row of the device's tables each sequence uses, and what must be sent to bring that row up to date.

Slots are a cache. Whatever a slot holds can be sent again from what the host knows, so nobody reports the end of a
sequence: when slots run out, those of sequences that are not in the step are given away.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from lamella_executor.sampler.device import SAMPLING_INTS, is_device_sampled, pack_sampling
from lamella_executor.scheduler.plan import ScheduledSequence
from lamella_executor.sequence import EVICTED_BLOCK, RequestState, Sequence

RECORD_INTS = 1 + SAMPLING_INTS  # slot, then what `pack_sampling` returns
SWEEP_INTERVAL = 256  # steps after which slots of sequences that hold no block any more are freed


@dataclass(slots=True, eq=False)
class Slot:
    """What the device holds for one sequence, as far as the host has sent it."""

    index: int
    is_device_sampled: bool
    is_greedy: bool
    num_prompt_tokens: int
    step: int = 0  # the last one that it was part of
    row: int = 0  # of that step's sampled tokens, if it was sampled
    sampled_step: int = 0  # the last one that sampled it on the device
    is_known: bool = False  # whether its sampling parameters were sent
    blocks: list[int] | None = None  # the sequence's own list: a restarted sequence has another
    num_blocks: int = 0
    last_block: int = EVICTED_BLOCK


@dataclass(slots=True)
class Updates:
    """What changed on the host since the last step."""

    records: list[int] = field(default_factory=list)  # RECORD_INTS per slot that got another sequence
    places: list[int] = field(default_factory=list)  # flat indices of the block tables
    blocks: list[int] = field(default_factory=list)  # what goes there

    @property
    def num_records(self) -> int:
        return len(self.records) // RECORD_INTS

    def __bool__(self) -> bool:
        return bool(self.records or self.places)


class SlotTable:
    """The host's side of the device's block tables and sampling parameters.

    Args:
        num_slots: sequences of one step at most.
        max_blocks: columns of the block tables.
        tokens_per_block: tokens a KV block holds.
        scratch_block: takes the place of blocks that left the attention window, so that no kernel sees a negative one.
    """

    def __init__(self, num_slots: int, max_blocks: int, tokens_per_block: int, scratch_block: int) -> None:
        self.num_slots = num_slots
        self.max_blocks = max_blocks
        self._tokens_per_block = tokens_per_block
        self._scratch = scratch_block
        self._slots: dict[Sequence, Slot] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self.step = 0

    def __len__(self) -> int:
        return len(self._slots)

    def undo(self) -> None:
        """Takes back a step that failed on its way to the device: what the device holds of any slot is unknown now.

        The rows of the step before it stay known, so its tokens can still be pending.
        """
        self.step -= 1
        for slot in self._slots.values():
            slot.is_known, slot.blocks = False, None

    def place(self, items: SequenceOf[ScheduledSequence], updates: Updates) -> list[Slot]:
        """Begins a step: returns each item's slot, and adds to ``updates`` what the device does not know yet.

        Raises:
            RuntimeError: more items than slots, or more blocks than columns.
        """
        self.step += 1
        step = self.step
        if step % SWEEP_INTERVAL == 0:
            self._drop([sequence for sequence in self._slots if not sequence.blocks])
        known = self._slots
        found = [known.get(item.sequence) for item in items]
        slots = self._assign(items, found)
        size = self._tokens_per_block
        for item, slot in zip(items, slots):
            slot.step = step
            if not slot.is_known:
                slot.is_known = True
                updates.records += _record(slot, item.request)
            blocks = item.sequence.blocks
            count = len(blocks)
            if (
                blocks is slot.blocks
                and count == slot.num_blocks
                and blocks[-1] == slot.last_block
                and item.start >= (count - 1) * size
            ):
                continue  # only the last block is written to, and it is the one known
            self._send_blocks(slot, blocks, item.start // size, updates)
        return slots

    def _assign(self, items: SequenceOf[ScheduledSequence], found: list[Slot | None]) -> list[Slot]:
        slots = [slot for slot in found if slot is not None]
        num_missing = len(found) - len(slots)
        if not num_missing:
            return slots
        if num_missing > len(self._free):
            kept = {item.sequence for item in items}
            self._drop([sequence for sequence in self._slots if sequence not in kept])
            if num_missing > len(self._free):
                raise RuntimeError(f"a step of {len(items)} sequences for {self.num_slots} slots")
        slots = []
        for item, slot in zip(items, found):
            if slot is None:
                slot = self._slots[item.sequence] = _make_slot(self._free.pop(), item)
            slots.append(slot)
        return slots

    def _drop(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._free.append(self._slots.pop(sequence).index)

    def _send_blocks(self, slot: Slot, blocks: list[int], first_written: int, updates: Updates) -> None:
        """Sends the blocks that may have changed: those from the first written one on, or all of a new list.

        Blocks before it change only by leaving the window, and what is there then is never read.
        """
        count = len(blocks)
        if count > self.max_blocks:
            raise RuntimeError(f"a sequence of {count} blocks for block tables of {self.max_blocks}")
        first = min(first_written, slot.num_blocks) if blocks is slot.blocks else 0
        start = slot.index * self.max_blocks
        updates.places += range(start + first, start + count)
        sent = blocks[first:]
        updates.blocks += sent if EVICTED_BLOCK not in sent else [b if b >= 0 else self._scratch for b in sent]
        slot.blocks, slot.num_blocks, slot.last_block = blocks, count, blocks[-1]


def _make_slot(index: int, item: ScheduledSequence) -> Slot:
    is_sampled = is_device_sampled(item.request)
    is_greedy = not is_sampled or item.request.params.is_greedy
    return Slot(index, is_sampled, is_greedy, item.sequence.num_prompt_tokens)


def _record(slot: Slot, request: RequestState) -> list[int]:
    """Returns a slot's sampling parameters as RECORD_INTS int32."""
    return [slot.index, *pack_sampling(request)]
