"""Step plans as they cross from rank 0 to the other ranks: one buffer of int32 each, and a mirror of every sequence.

Both sides keep a table of the sequences that steps have computed, under small ids that rank 0 gives out. A buffer says
only what the other side cannot know: of a sequence that just goes on to its next token its id and that token, of others
the step's token ids, new blocks of the block table, and what the device samples with when the sequence is new. Tokens
outside of the step are not sent (those of a reused prefix never are), nor are blocks that leave the attention window:
both are never read again.

Size: 8 bytes per decoding sequence and 40 per step; 20 more when a sequence gets a block (once in tokens_per_block
tokens); 76 for a new sequence and 4 per block of it; 16 per other item and 4 per token of it; 8 per copy; 4 per
sequence that ended.

Layout, native byte order: header (`_HEADER`), ids that are given back, records of new sequences (id, num_prompt_tokens
with a sign, num_prefix_tokens, mask_place, sampling parameters), changes of block tables (id, first place, number of
blocks, state slot, blocks), plain items (ids, then tokens), other items (id, start, num_tokens, num_logits and
is_sampled), their token ids, copies of blocks, copies of states. Plain is a sampled next token; those items lead a
plan.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lamella_executor.sampler.device import SAMPLING_INTS, is_device_sampled, pack_sampling, unpack_sampling
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import EVICTED_BLOCK, RequestState, Sequence

_HEADER = 10  # step number, then the sizes in int32 of the nine sections, in order
_RECORD_HEAD = 4  # before the sampling parameters
_RECORD = _RECORD_HEAD + SAMPLING_INTS
_CHANGE = 4  # before the blocks
_ITEM = 4
_ALL = -1  # instead of ids that are given back
_SWEEP_INTERVAL = 256  # steps after which sequences that hold no block any more are forgotten
_LEAST_SWEEP = 64  # sequences; or as soon as there are twice as many as the last sweep left


@dataclass(slots=True, eq=False)
class _Known:
    """What the other ranks know of a sequence."""

    id: int
    end: int = -1  # of the tokens computed so far
    blocks: list[int] | None = None  # the sequence's own list: a restarted sequence has another
    num_blocks: int = 0
    last_block: int = EVICTED_BLOCK
    state_slot: int = -1


@dataclass(slots=True)
class _Sections:
    """One step's buffer while it is made."""

    dropped: list[int]
    records: list[int] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)
    plain_ids: list[int] = field(default_factory=list)
    plain_tokens: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    state_copies: list[int] = field(default_factory=list)

    def pack(self, step: int) -> bytes:
        sections = (
            self.dropped, self.records, self.changes, self.plain_ids, self.plain_tokens, self.items, self.tokens,
            self.copies, self.state_copies,
        )  # fmt: skip
        values = array("i", [step, *map(len, sections)])
        for section in sections:
            values.extend(section)
        return values.tobytes()


class PlanEncoder:
    """Rank 0's side. Every buffer that `encode` returns has to reach every decoder, in order.

    Args:
        tokens_per_block: tokens a KV block holds.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._tokens_per_block = tokens_per_block
        self._known: dict[Sequence, _Known] = {}
        self._free: list[int] = []
        self._num_ids = 0  # ever given out: 0 to this
        self._dropped: list[int] = []  # given back since the last buffer
        self._sweep_at = _LEAST_SWEEP
        self._step = 0

    def __len__(self) -> int:
        """Sequences that both sides remember."""
        return len(self._known)

    def encode(self, plan: StepPlan) -> bytes:
        """Returns a plan as the other ranks need it.

        Raises:
            OverflowError: a token id or a position exceeds int32. Whatever is raised, decoders have missed nothing.
        """
        try:
            return self._encode(plan)
        except BaseException:
            self._forget_all()
            raise

    def _encode(self, plan: StepPlan) -> bytes:
        if (self._step + 1) % _SWEEP_INTERVAL == 0 or len(self._known) >= self._sweep_at:
            self._sweep()
        out = _Sections(self._dropped)
        is_plain = True  # all items so far
        for item in plan.items:
            sequence, start = item.sequence, item.start
            known = self._known.get(sequence) or self._introduce(item, out)
            self._compare_blocks(known, item, out)
            is_plain = is_plain and item.num_tokens == 1 == item.num_logits and item.is_sampled and start == known.end
            if is_plain:
                out.plain_ids.append(known.id)
                out.plain_tokens.append(sequence.token_ids[start])
            else:
                out.items += (known.id, start, item.num_tokens, item.num_logits << 1 | item.is_sampled)
                out.tokens += sequence.token_ids[start : item.end]
            known.end = item.end
        for copy in plan.block_copies:
            out.copies += copy
        for copy in plan.state_copies:
            out.state_copies += copy
        packed = out.pack(self._step + 1)
        self._step += 1
        self._dropped = []
        return packed

    def _introduce(self, item: ScheduledSequence, out: _Sections) -> _Known:
        if not self._free:
            self._free.append(self._num_ids)
            self._num_ids += 1
        sequence = item.sequence
        known = self._known[sequence] = _Known(self._free.pop())
        prompt = sequence.num_prompt_tokens
        out.records += (known.id, prompt if is_device_sampled(item.request) else -1 - prompt)
        out.records += (sequence.num_prefix_tokens, sequence.mask_place)
        out.records += pack_sampling(item.request)
        return known

    def _compare_blocks(self, known: _Known, item: ScheduledSequence, out: _Sections) -> None:
        """Sends the blocks that may have changed: those from the first written one on, or all of a new list."""
        sequence, start, size = item.sequence, item.start, self._tokens_per_block
        blocks, slot = sequence.blocks, sequence.state_slot
        count = len(blocks)
        last = blocks[-1] if blocks else EVICTED_BLOCK
        is_same = blocks is known.blocks
        if is_same and count == known.num_blocks and last == known.last_block and slot == known.state_slot:
            if start >= (count - 1) * size:
                return  # only the last block is written to, and it is the one known
        first = min(start // size, known.num_blocks) if is_same else 0
        out.changes += (known.id, first, count, slot)
        out.changes += blocks[first:]
        known.blocks, known.num_blocks, known.last_block, known.state_slot = blocks, count, last, slot

    def _sweep(self) -> None:
        ended = [sequence for sequence in self._known if not sequence.blocks]
        ids = [self._known.pop(sequence).id for sequence in ended]
        self._free += ids
        self._dropped += ids
        self._sweep_at = max(_LEAST_SWEEP, 2 * len(self._known))

    def _forget_all(self) -> None:
        """Forgets every sequence after a buffer that was not sent; the next one tells the decoders."""
        self._known.clear()
        self._free.clear()
        self._num_ids = 0
        self._dropped = [_ALL]


@dataclass(slots=True, eq=False)
class _Mirror:
    """A sequence of rank 0, as far as it was told; its tokens outside of a step are zeros or long known ones."""

    request: RequestState
    sequence: Sequence
    end: int = -1


class PlanDecoder:
    """The other ranks' side. The requests of its plans have one sequence each, and what runners read of them."""

    def __init__(self) -> None:
        self._mirrors: dict[int, _Mirror] = {}
        self._step = 0

    def __len__(self) -> int:
        """Sequences that both sides remember."""
        return len(self._mirrors)

    def decode(self, buffer: bytes | bytearray | memoryview) -> StepPlan:
        """Returns the next plan; sequences and requests in it are the same objects from step to step.

        Raises:
            RuntimeError: the buffer is not the next one, or is no step at all. The decoder is of no use then.
        """
        dropped, records, changes, plain_ids, plain_tokens, items, tokens, copies, states = self._sections(buffer)
        for id_ in list(self._mirrors) if _ALL in dropped else dropped:
            self._mirrors.pop(id_).sequence.blocks = []  # runners see by that that a sequence has ended
        for first in range(0, len(records), _RECORD):
            self._introduce(records[first : first + _RECORD])
        self._change_blocks(changes)
        plan = StepPlan(
            block_copies=list(zip(copies[::2], copies[1::2])), state_copies=list(zip(states[::2], states[1::2]))
        )
        for id_, token in zip(plain_ids, plain_tokens):
            mirror = self._mirrors[id_]
            plan.items.append(_item(mirror, mirror.end, [token], 1, is_sampled=True))
        first = 0
        for id_, start, count, logits in _rows(items, _ITEM):
            ids = tokens[first : first + count]
            first += count
            plan.items.append(_item(self._mirrors[id_], start, ids, logits >> 1, is_sampled=bool(logits & 1)))
        return plan

    def _sections(self, buffer: bytes | bytearray | memoryview) -> Iterator[list[int]]:
        if len(buffer) % 4:
            raise RuntimeError(f"a step of {len(buffer)} bytes, which is no number of int32 values")
        values: list[int] = memoryview(buffer).cast("B").cast("i").tolist()
        step, sizes = next(iter(values), 0), values[1:_HEADER]
        if len(sizes) != _HEADER - 1 or min(sizes) < 0 or _HEADER + sum(sizes) != len(values):
            raise RuntimeError(f"a step of {len(values)} int32 values is damaged: its header is {values[:_HEADER]}")
        if step != self._step + 1:
            raise RuntimeError(f"step {step} came after step {self._step}")
        self._step = step
        return _cut(values, _HEADER, sizes)

    def _introduce(self, record: list[int]) -> None:
        id_, prompt, prefix, mask_place = record[:_RECORD_HEAD]
        params, seed = unpack_sampling(record[_RECORD_HEAD:])
        is_device_sampled = prompt >= 0
        prompt = prompt if is_device_sampled else -1 - prompt
        sequence = Sequence(0, [], prompt, num_prefix_tokens=prefix, mask_place=mask_place)
        request = RequestState(id_, params, seed, None, 1, [sequence], 0.0, device_sampled=is_device_sampled)
        self._mirrors[id_] = _Mirror(request, sequence)

    def _change_blocks(self, changes: list[int]) -> None:
        place = 0
        while place < len(changes):
            id_, first, count, slot = changes[place : place + _CHANGE]
            place += _CHANGE
            sent = changes[place : place + count - first]
            place += count - first
            sequence = self._mirrors[id_].sequence
            sequence.state_slot = slot
            if first:
                sequence.blocks[first:] = sent
            else:
                sequence.blocks = sent  # a new list: that is how runners see a restart


def _cut(values: list[int], first: int, sizes: Iterable[int]) -> Iterator[list[int]]:
    for size in sizes:
        yield values[first : first + size]
        first += size


def _rows(values: list[int], width: int) -> Iterator[list[int]]:
    return (values[first : first + width] for first in range(0, len(values), width))


def _item(mirror: _Mirror, start: int, ids: list[int], num_logits: int, *, is_sampled: bool) -> ScheduledSequence:
    sequence = mirror.sequence
    known = sequence.token_ids
    if len(known) < start:
        known += [0] * (start - len(known))
    known[start:] = ids
    mirror.end = start + len(ids)
    if not is_sampled:
        known.append(0)  # stands for the tokens that are still to come
    sequence.num_computed_tokens = start
    return ScheduledSequence(mirror.request, sequence, start, len(ids), num_logits)
