"""A device without a model, for the engine's loop: it simulates the KV cache and holds the loop to its contracts.

The logits of a position are a pure function of the tokens up to it. The cache holds, per position, the tokens up to it,
and a recurrent state all tokens that went into it; every read is checked against what the sequence's tokens say should
be there, every findable block against the tokens under which it is found. A `FakeDevice` computes in the order of its
launches and gives results away only when they are collected; a `FakeRunner` computes the same at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from lamella_executor.kv_cache import KvCacheManager
from lamella_executor.kv_cache.prefix import pack
from lamella_executor.runner.base import NAN_LOGITS, PENDING_TOKEN
from lamella_executor.sampler.device import is_device_sampled
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.sampler.types import SampleRow
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import EVICTED_BLOCK, Sequence

VOCAB = 24
POISON = VOCAB - 1  # the logits after this token are NaN
SPOILED = (-7,)


class Violation(BaseException):
    """The loop broke a contract. No Exception, which would be taken for a step that failed."""


def require(is_kept: object, contract: str) -> None:
    if not is_kept:
        raise Violation(contract)


def logits_after(tokens: tuple[int, ...]) -> list[float]:
    """[VOCAB] floats; token 0 and `POISON` are unlikely."""
    if tokens[-1] == POISON:
        return [float("nan")] * VOCAB
    digest = hashlib.blake2b(pack(list(tokens)), digest_size=2 * VOCAB).digest()
    row = [int.from_bytes(digest[2 * i : 2 * i + 2], "little") / 8192 for i in range(VOCAB)]
    row[0] -= 1.5
    row[POISON] = -20.0
    return row


class FakeCache:
    """The contents of the KV blocks as the device sees them, in the order of its steps."""

    def __init__(self, kv: KvCacheManager, window: int | None, num_sinks: int) -> None:
        self._kv = kv
        self._window = window
        self._num_sinks = num_sinks
        self._size = kv.tokens_per_block
        self._contents: list[list[tuple[int, ...] | None]] = [[None] * self._size for _ in range(kv.num_blocks)]
        self._states: list[tuple[int, ...]] = [SPOILED] * kv.num_state_slots
        self._digests: dict[tuple[int, ...], bytes] = {(): kv._index.root()}  # whole blocks' tokens -> the last's name

    def compute(self, plan: StepPlan, tokens: dict[Sequence, tuple[int, ...]]) -> torch.Tensor:
        """Carries out copies and writes, checks all reads; returns logits [plan.num_logits, VOCAB] float32."""
        sources = {source for source, _ in plan.block_copies}
        destinations = [destination for _, destination in plan.block_copies]
        require(len(set(destinations)) == len(destinations) and not sources & set(destinations), "bad block copies")
        for source, destination in plan.block_copies:
            self._contents[destination] = list(self._contents[source])
        self._advance_states(plan, tokens)
        written: set[tuple[int, int]] = set()
        for item in plan.items:
            for position in range(item.start, item.end):
                block, offset = self._place(item.sequence, position)
                require((block, offset) not in written, "two sequences write the same place")
                require(self._kv._pool.is_exclusive(block), "a block is written that is shared or findable")
                written.add((block, offset))
                self._contents[block][offset] = tokens[item.sequence][: position + 1]
        rows = []
        for item in plan.items:
            self._check_reads(item, tokens[item.sequence])
            rows += [logits_after(tokens[item.sequence][: p + 1]) for p in range(item.end - item.num_logits, item.end)]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), VOCAB)

    def spoil(self, items: list[ScheduledSequence]) -> None:
        """What a launch that fails half way may have written."""
        for item in items:
            if self._states:
                self._states[item.sequence.state_slot] = SPOILED
            for position in range(item.start, item.end):
                block, offset = self._place(item.sequence, position)
                self._contents[block][offset] = SPOILED

    def check_findable(self) -> None:
        """Every block that can be found holds the tokens under which it is found."""
        for block, entry in self._kv._index._entries.items():
            whole = self._contents[block][-1]
            require(whole is not None and whole != SPOILED, f"findable block {block} was never filled")
            require(pack(list(whole[-self._size :])) == entry.tokens, f"findable block {block} was overwritten")
            first = len(whole) - self._size
            require(
                self._contents[block] == [whole[: first + 1 + i] for i in range(self._size)],
                "a findable block is inconsistent",
            )
            require(self._digest(whole) == entry.digest, f"findable block {block} is found under other tokens")

    def _digest(self, tokens: tuple[int, ...]) -> bytes:
        if tokens not in self._digests:
            last = pack(list(tokens[-self._size :]))
            self._digests[tokens] = self._kv._index.extend(self._digest(tokens[: -self._size]), last)
        return self._digests[tokens]

    def _advance_states(self, plan: StepPlan, tokens: dict[Sequence, tuple[int, ...]]) -> None:
        """Carries out copies, then lets each sequence's state take in its tokens of this step."""
        filled: set[int] = set()
        for source, destination in plan.state_copies:
            require(source not in filled and destination not in filled, "bad copies of states")
            filled.add(destination)
            self._states[destination] = self._states[source]
        slots = [item.sequence.state_slot for item in plan.items]
        if not self._states:
            require(all(slot == -1 for slot in slots), "slots without states")
            return
        require(len(set(slots)) == len(slots) and min(slots, default=0) >= 0, "two sequences have the same state")
        for item, slot in zip(plan.items, slots, strict=True):
            known = tokens[item.sequence]
            require(not item.start or self._states[slot] == known[: item.start], f"foreign state in slot {slot}")
            self._states[slot] = known[: item.end]

    def _check_reads(self, item: ScheduledSequence, tokens: tuple[int, ...]) -> None:
        window = self._window or item.end
        visible = {*range(max(item.start - window + 1, 0), item.end), *range(min(self._num_sinks, item.end))}
        for position in visible:
            block, offset = self._place(item.sequence, position)
            require(self._contents[block][offset] == tokens[: position + 1], f"foreign contents in block {block}")

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block = sequence.blocks[position // self._size]
        require(block != EVICTED_BLOCK, f"position {position} was evicted but is still visible")
        return block, position % self._size


class FakeRunner:
    """Computes a step while the loop waits."""

    def __init__(self, cache: FakeCache, failing: set[int] | None = None) -> None:
        self.cache = cache
        self.failing = failing or set()  # numbers of the steps that fail, from 1 on
        self.num_steps = 0

    def run(self, plan: StepPlan) -> torch.Tensor:
        self.num_steps += 1
        self.cache.check_findable()
        if self.num_steps in self.failing:
            self.cache.spoil(plan.items[::2])
            raise MemoryError("no room for activations")
        return self.cache.compute(plan, {item.sequence: tuple(item.sequence.token_ids) for item in plan.items})


@dataclass(eq=False)
class FakeStep:
    """A launched step."""

    device: FakeDevice
    number: int
    kept_logits: torch.Tensor | None
    tokens: list[int]
    error: Exception | None = None

    @property
    def logits(self) -> torch.Tensor | None:
        require(self.device.num_steps == self.number, "logits are read after a later launch")
        require(self not in self.device.in_flight, "logits are read before the step was waited for")
        return self.kept_logits

    def collect(self) -> list[int]:
        require(self.device.in_flight[0] is self, "steps are collected out of order, or twice")
        self.device.in_flight.pop(0)
        if self.error is not None:
            raise self.error
        return list(self.tokens)


@dataclass
class FakeDevice:
    """A `LaunchingRunner`; keeps the sampled tokens to itself until they are collected."""

    cache: FakeCache
    failing: set[int] = field(default_factory=set)  # launches that raise, from 1 on
    breaking: set[int] = field(default_factory=set)  # launches whose collection raises
    num_steps: int = 0
    num_overlapped: int = 0  # launches with another step in flight
    num_pending: int = 0  # tokens that were computed before the host knew them
    in_flight: list[FakeStep] = field(default_factory=list)
    last_tokens: dict[Sequence, int] = field(default_factory=dict)  # sampled by the last launch

    def launch(self, plan: StepPlan) -> FakeStep:
        self.num_steps += 1
        require(plan.items, "an empty step was launched")
        require(len(self.in_flight) <= 1, "more than one other step is in flight")
        self.num_overlapped += bool(self.in_flight)
        self.cache.check_findable()
        tokens = {item.sequence: self._known(item) for item in plan.items}
        self.last_tokens = {}
        if self.num_steps in self.failing:
            self.cache.spoil(plan.items[::2])
            raise MemoryError("no room for activations")
        logits = self.cache.compute(plan, tokens)
        sampled, has_host_rows = self._sample(plan, logits)
        self.last_tokens = {sequence: max(token, 0) for sequence, token in sampled}  # a row goes on whatever it holds
        error = ArithmeticError("the device broke") if self.num_steps in self.breaking else None
        kept = logits if has_host_rows else None
        self.in_flight.append(FakeStep(self, self.num_steps, kept, [token for _, token in sampled], error))
        return self.in_flight[-1]

    def _known(self, item: ScheduledSequence) -> tuple[int, ...]:
        """The tokens of an item, its pending one taken from the last launch."""
        tokens = item.sequence.token_ids[: item.end]
        require(PENDING_TOKEN not in tokens[:-1], "a token before the last one is pending")
        if tokens[-1] == PENDING_TOKEN:
            require(item.sequence in self.last_tokens, "a pending token does not come from the launch before")
            require(self.in_flight, "a pending token's step has been collected")
            tokens[-1] = self.last_tokens[item.sequence]
            self.num_pending += 1
        return tuple(tokens)

    def _sample(self, plan: StepPlan, logits: torch.Tensor) -> tuple[list[tuple[Sequence, int]], bool]:
        sampled: list[tuple[Sequence, int]] = []
        has_host_rows, row = False, 0
        for item in plan.items:
            row += item.num_logits
            if item.is_sampled and is_device_sampled(item.request):
                (result,) = Sampler(VOCAB).sample([SampleRow(item.request, row - 1)], logits.clone())
                is_bad = result.error is not None
                sampled.append((item.sequence, NAN_LOGITS if is_bad else result.continuations[0].token_id))
            else:
                has_host_rows = has_host_rows or item.num_logits > 0
        return sampled, has_host_rows
