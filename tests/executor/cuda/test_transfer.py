"""Packed steps: which integers stand where, and that buffers are used again only when they may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support.device_steps import request_of

from lamella_executor.runner.cuda.batch import is_decode_only, pack_decode, pack_mixed
from lamella_executor.runner.cuda.slots import Slot
from lamella_executor.runner.cuda.transfer import ALIGNMENT, RING, Inbox, Outbox
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.scheduler.plan import ScheduledSequence
from lamella_executor.sequence import PENDING_TOKEN

CPU = torch.device("cpu")
TABLES = torch.zeros(8, 4, dtype=torch.int32)  # the last slot is scratch


def item(ids: list[int], start: int, count: int, num_logits: int, num_prompt: int | None = None, **params):
    request = request_of(ids, SamplingParams(**params))
    request.sequences[0].num_prompt_tokens = len(ids) if num_prompt is None else num_prompt
    return ScheduledSequence(request, request.sequences[0], start, count, num_logits)


def slot(index: int, item: ScheduledSequence, *, on_device: bool = True, **known: int) -> Slot:
    return Slot(index, on_device, True, item.sequence.num_prompt_tokens, **{"step": 9, **known})


@pytest.fixture
def inbox() -> Inbox:
    made = Inbox(1024, CPU)
    made.begin()
    return made


def test_decode_steps_are_padded(inbox):
    items = [item([3, 4, 5, PENDING_TOKEN], 3, 1, 1, num_prompt=3), item([7, 8], 1, 1, 1, num_prompt=2)]
    slots = [slot(6, items[0], row=2, sampled_step=8), slot(0, items[1])]
    assert is_decode_only(items)
    inputs = pack_decode(inbox, TABLES, items, slots, 4)
    inbox.send()
    assert inputs.tokens.tolist() == [-3, 8, 0, 0]
    assert inputs.token_slots.tolist() == inputs.sampled_slots.tolist() == [6, 0, 7, 7]
    assert inputs.positions.tolist() == [3, 1, 0, 0]
    assert inputs.generated.tolist() == [1, 0, 0, 0]
    attention = inputs.attention
    assert attention.context_lens.tolist() == [4, 2, 1, 1]
    assert (attention.num_decode, attention.num_tokens, attention.max_context_len) == (4, 4, 4)
    assert [(s.row, s.sampled_step) for s in slots] == [(0, 9), (1, 9)]


def test_mixed_steps(inbox):
    items = [
        item([5, 6, PENDING_TOKEN], 2, 1, 1, num_prompt=2),  # decodes
        item([1, 2, 3], 2, 1, 1, logprobs=0),  # one token, sampled by the host
        item(list(range(10, 20)), 4, 3, 0),  # a chunk
        item([1, 2, 3, 4], 0, 4, 4, prompt_logprobs=0),
        item([7, 8], 1, 1, 1),  # one token after a chunk
        item([4, 9, 9, 9], 1, 3, 1),
    ]
    on_device = [True, False, True, False, True, True]
    slots = [slot(i, it, on_device=d) for i, (it, d) in enumerate(zip(items, on_device, strict=True))]
    slots[0].row, slots[0].sampled_step = 5, 8
    assert not is_decode_only(items)
    inputs = pack_mixed(inbox, TABLES, items, slots)
    inbox.send()
    assert inputs.tokens.tolist() == [-6, 3, 14, 15, 16, 1, 2, 3, 4, 8, 9, 9, 9]
    assert inputs.token_slots.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5, 5, 5]
    assert inputs.positions.tolist() == [2, 2, 4, 5, 6, 0, 1, 2, 3, 1, 1, 2, 3]
    attention = inputs.attention
    assert attention.num_decode == 2 and attention.max_query_len == 4 and attention.max_context_len == 7
    assert attention.table_rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert attention.context_lens.tolist() == [3, 3, 7, 4, 2, 4]
    assert attention.query_start.tolist() == [0, 3, 7, 8, 11]
    assert np.array_equal(attention.host.query, [1, 1, 3, 4, 1, 3])
    assert inputs.logit_rows.tolist() == [0, 1, 5, 6, 7, 8, 9, 12]
    assert inputs.sampled_rows.tolist() == [0, 6, 7]
    assert inputs.sampled_slots.tolist() == [0, 4, 5] and inputs.generated.tolist() == [1, 0, 0]
    assert [(s.row, s.sampled_step) for s in slots] == [(0, 9), (0, 0), (0, 0), (0, 0), (1, 9), (2, 9)]


def test_a_token_that_nobody_sampled(inbox):
    pending = item([5, PENDING_TOKEN], 1, 1, 1, num_prompt=1)
    with pytest.raises(RuntimeError, match="pending that the previous step did not sample"):
        pack_decode(inbox, TABLES, [pending], [slot(0, pending, sampled_step=7)], 1)


def test_sections_are_aligned_and_bounded():
    inbox = Inbox(4 * ALIGNMENT, CPU)
    inbox.begin()
    first, second = inbox.put([1, 2, 3]), inbox.put([4], 2, fill=-1)
    assert inbox.fits(2 * ALIGNMENT) and not inbox.fits(2 * ALIGNMENT, 1)
    inbox.send()
    assert (first.tolist(), second.tolist()) == ([1, 2, 3], [4, -1])
    assert second.data_ptr() - first.data_ptr() == 4 * ALIGNMENT
    inbox.reserve(2 * ALIGNMENT)
    with pytest.raises(RuntimeError, match="its buffer holds 64"):
        inbox.reserve(1)


class Event:
    """Remembers the order in which host buffers are handed over and waited for."""

    log: list[tuple[str, int]] = []

    def __init__(self, name: int) -> None:
        self.name = name

    def record(self) -> None:
        self.log.append(("record", self.name))

    def synchronize(self) -> None:
        self.log.append(("wait", self.name))


def test_a_buffer_is_waited_for_before_it_is_written_again(monkeypatch):
    monkeypatch.setattr(Event, "log", [])
    inbox, outbox = Inbox(64, CPU), Outbox(4, CPU)
    for box in (inbox, outbox):
        for place, buffer in enumerate(box._ring):
            buffer._event = Event(place)
    for _ in range(RING + 1):
        inbox.begin()
        inbox.put([1])
        inbox.send()
    turns = [(1, 1), (2, 2), (0, 0), (1, 1)]
    assert Event.log == [(what, turn) for pair in turns for what, turn in zip(("wait", "record"), pair, strict=True)]
    Event.log.clear()
    fetched = []
    for step in range(RING + 1):
        outbox.tokens.fill_(step)
        fetched.append(outbox.fetch(2))
    assert Event.log == [("record", 1), ("record", 2), ("record", 0), ("wait", 1), ("record", 1)]
    assert [tokens.wait() for tokens in fetched] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert fetched[0].wait() == [0, 0]
