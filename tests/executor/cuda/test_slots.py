"""SlotTable: what is sent to the device, and that it is enough, whatever happens to the sequences' blocks."""

from __future__ import annotations

import random

import pytest
from tests.support.device_steps import request_of

from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.runner.cuda.slots import RECORD_INTS, SlotTable, Updates
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.scheduler.plan import ScheduledSequence
from lamella_executor.sequence import EVICTED_BLOCK, RequestState

BLOCK, COLUMNS, SCRATCH = 4, 16, 999


class Mirror:
    """A slot table and the device's side of it."""

    def __init__(self, num_slots: int = 4) -> None:
        self.table = SlotTable(num_slots, COLUMNS, BLOCK, SCRATCH)
        self.device = [SCRATCH] * (num_slots * COLUMNS)
        self.owners: dict[int, int] = {}  # slot -> top_k of the request it was sent for

    def step(self, *items: ScheduledSequence) -> Updates:
        updates = Updates()
        slots = self.table.place(items, updates)
        assert len(set(updates.places)) == len(updates.places)
        for place, block in zip(updates.places, updates.blocks, strict=True):
            self.device[place] = block
        for start in range(0, len(updates.records), RECORD_INTS):
            self.owners[updates.records[start]] = updates.records[start + 1]
        assert len({slot.index for slot in slots}) == len(items)
        for item, slot in zip(items, slots, strict=True):
            row = self.device[slot.index * COLUMNS : (slot.index + 1) * COLUMNS]
            for place, block in enumerate(item.sequence.blocks):
                assert block in (row[place], EVICTED_BLOCK)
            assert SCRATCH not in row[: len(item.sequence.blocks)] or EVICTED_BLOCK in item.sequence.blocks
            assert self.owners[slot.index] == (item.request.params.top_k or 0)
        return updates


def made(blocks: list[int], num_tokens: int | None = None, top_k: int | None = None) -> RequestState:
    count = len(blocks) * BLOCK if num_tokens is None else num_tokens
    request = request_of([1] * count, SamplingParams(top_k=top_k, seed=1) if top_k else None)
    request.sequences[0].blocks = blocks
    return request


def one(request: RequestState, start: int, count: int = 1) -> ScheduledSequence:
    return ScheduledSequence(request, request.sequences[0], start, count, 1)


def test_nothing_is_sent_again():
    mirror, request = Mirror(), made([5, 6], num_tokens=7)
    assert mirror.step(one(request, 0, 6)).blocks == [5, 6]
    assert not mirror.step(one(request, 6))
    request.sequences[0].blocks.append(7)
    assert mirror.step(one(request, 8)).blocks == [7]
    assert not mirror.step(one(request, 9))


def test_another_block_in_the_place_of_the_last():
    mirror, request = Mirror(), made([5, 6, 7], num_tokens=10)
    mirror.step(one(request, 0, 9))
    request.sequences[0].blocks[2] = 8  # copied on write
    assert mirror.step(one(request, 9)).blocks == [8]


def test_a_block_replaced_before_one_allocated_ahead():
    mirror, request = Mirror(), made([5, 6, 7], num_tokens=9)
    mirror.step(one(request, 0, 5))
    request.sequences[0].blocks[1] = 8
    assert mirror.step(one(request, 5)).blocks == [8, 7]


def test_a_restarted_sequence_is_sent_whole():
    mirror, request = Mirror(), made([5, 6, 7], num_tokens=10)
    mirror.step(one(request, 0, 9))
    request.sequences[0].blocks = [5, 4, 7]  # as long, with the same end
    assert mirror.step(one(request, 9)).blocks == [5, 4, 7]


def test_blocks_behind_the_window_are_not_sent():
    mirror, request = Mirror(), made([5, 6, 7], num_tokens=10)
    mirror.step(one(request, 0, 9))
    request.sequences[0].blocks[0] = EVICTED_BLOCK
    assert not mirror.step(one(request, 9))
    fresh = made([EVICTED_BLOCK, 3], num_tokens=6)
    assert mirror.step(one(fresh, 5)).blocks == [SCRATCH, 3]


def test_slots_are_taken_from_those_not_in_the_step():
    mirror = Mirror(num_slots=3)
    a, b, c, d = (made([i], num_tokens=3, top_k=10 + i) for i in range(4))
    mirror.step(one(a, 0), one(b, 0), one(c, 0))
    updates = mirror.step(one(b, 1), one(d, 0))
    assert updates.num_records == 1 and updates.blocks == [3]
    assert len(mirror.table) == 2  # a and c made room
    assert mirror.step(one(a, 1), one(b, 2)).blocks == [0]
    with pytest.raises(RuntimeError, match="4 sequences for 3 slots"):
        mirror.step(one(a, 2), one(b, 2), one(c, 2), one(d, 2))


def test_a_failed_step_makes_everything_unknown_but_the_rows():
    mirror, request = Mirror(), made([5, 6], num_tokens=7)
    mirror.step(one(request, 0, 6))
    slot = mirror.table.place([one(request, 6)], Updates())[0]
    slot.row, slot.sampled_step = 3, mirror.table.step
    mirror.table.place([one(request, 7)], Updates())
    mirror.table.undo()
    updates = mirror.step(one(request, 7))
    assert updates.blocks == [5, 6] and updates.num_records == 1
    assert slot.sampled_step == mirror.table.step - 1


def test_sequences_without_blocks_are_let_go(monkeypatch):
    monkeypatch.setattr("lamella_executor.runner.cuda.slots.SWEEP_INTERVAL", 2)
    mirror, done, other = Mirror(), made([1], 3), made([2], 3)
    mirror.step(one(done, 0))
    done.sequences[0].blocks = []
    mirror.step(one(other, 0))
    assert len(mirror.table) == 1


def test_parameters_of_greedy_and_host_sampled_requests():
    mirror = Mirror()
    greedy, host = made([1], 3), made([2], 3)
    host.params = SamplingParams(top_k=50, logprobs=1)
    updates = Updates()
    slots = mirror.table.place([one(greedy, 0), one(host, 0)], updates)
    assert [slot.is_device_sampled for slot in slots] == [True, False] and all(slot.is_greedy for slot in slots)
    assert updates.records[1] == updates.records[RECORD_INTS + 1] == 0


def test_more_blocks_than_columns():
    with pytest.raises(RuntimeError, match="17 blocks for block tables of 16"):
        Mirror().step(one(made(list(range(17))), 0))


def chosen_work(rng: random.Random, kv: KvCacheManager, live: list[RequestState]) -> list[ScheduledSequence]:
    """Some tokens of some of the sequences, their blocks allocated."""
    chosen = []
    for request in rng.sample(live, rng.randrange(len(live) + 1)):
        sequence = request.sequences[0]
        if not sequence.blocks:
            kv.attach(sequence, kv.match_prefix(sequence))
        start = sequence.num_computed_tokens
        count = rng.randrange(1, sequence.num_tokens - start + 1)
        if kv.allocate(sequence, start + count):
            chosen.append(one(request, start, count))
    kv.take_copies()
    return chosen


def meet_fate(rng: random.Random, kv: KvCacheManager, live: list[RequestState], request: RequestState) -> None:
    """A sequence is paused, ends, forks, or goes on."""
    fate, sequence = rng.random(), request.sequences[0]
    if fate < 0.05:
        kv.free(sequence)
    elif fate < 0.08 or sequence.num_tokens > 50:
        kv.free(sequence)
        live.remove(request)
    elif fate < 0.12 and len(live) < 6 and sequence.blocks:
        child = sequence.fork(0)
        kv.fork(sequence, child)
        live.append(request_of([]))
        live[-1].sequences = [child]


@pytest.mark.parametrize("seed", range(6))
def test_random_lives(seed):
    """Sequences that grow, fork, pause, restart on shared blocks and end: the device always knows their blocks."""
    rng, kv, mirror = random.Random(seed), KvCacheManager(40, BLOCK), Mirror(num_slots=6)
    live: list[RequestState] = []
    for _ in range(250):
        if len(live) < 6 and rng.random() < 0.3:
            live.append(request_of([rng.randrange(2) for _ in range(rng.randrange(1, 14))]))
        chosen = chosen_work(rng, kv, live)
        if chosen:
            mirror.step(*chosen)
        for item in chosen:
            item.sequence.num_computed_tokens = item.end
            kv.commit(item.sequence, item.start)
            if item.is_sampled:
                item.sequence.token_ids.append(rng.randrange(2))
        for request in list(live):
            meet_fate(rng, kv, live, request)
