"""A step's plan as packed integers: what the host writes, and the device tensors that the step reads.

Legend: T rows of the step, S sequences, of which the first D_ compute one token; L rows whose logits are wanted, R of
them sampled on the device.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lamella_core.prefix import PrefixTokens
from lamella_executor.attention.backend import AttentionStep, HostLengths
from lamella_executor.attention.states import StepStates
from lamella_executor.runner.cuda.slots import Slot
from lamella_executor.runner.cuda.transfer import Inbox
from lamella_executor.scheduler.plan import ScheduledSequence


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Device tensors of one step; all but ``attention.block_tables`` are sections of the inbox, int32."""

    tokens: Tensor  # [T], -1 - row: what the previous step sampled in that row
    token_slots: Tensor  # [T]
    positions: Tensor  # [T]
    attention: AttentionStep
    logit_rows: Tensor | None  # [L] of T; None: all rows
    num_logits: int  # L
    sampled_rows: Tensor | None  # [R] of L; None: all of them
    sampled_slots: Tensor  # [R]
    generated: Tensor  # [R], tokens that each sampled sequence has generated so far
    num_sampled: int  # R
    states: StepStates | None = None  # of a model with recurrent states
    prefixes: PrefixTokens | None = None  # of a model with prefixes; int32


def is_decode_only(items: SequenceOf[ScheduledSequence]) -> bool:
    """Whether each item computes one token and wants its logits."""
    return all([item.num_tokens == 1 == item.num_logits for item in items])


def pack_decode(
    inbox: Inbox,
    block_tables: Tensor,
    items: SequenceOf[ScheduledSequence],
    slots: SequenceOf[Slot],
    size: int,
    scratch_state: int | None = None,
    *,
    has_prefixes: bool = False,
) -> StepInputs:
    """Packs a step of one token each, padded to ``size`` rows that belong to the last slot, which is scratch.

    ``scratch_state`` is the scratch slot of recurrent states; None: the model has none. ``has_prefixes`` says whether
    it has those.
    """
    step = slots[0].step
    starts = [item.start for item in items]
    tokens = [item.sequence.token_ids[start] for item, start in zip(items, starts)]
    if min(tokens) < 0:
        tokens = [token if token >= 0 else _pending(slot, step) for token, slot in zip(tokens, slots)]
    positions = np.array(starts, np.int32)
    prompts = np.array([slot.num_prompt_tokens for slot in slots], np.int32)
    contexts = positions + 1
    sections = (
        inbox.put(tokens, size),
        inbox.put([slot.index for slot in slots], size, fill=block_tables.shape[0] - 1),
        inbox.put(positions, size),
        inbox.put(contexts, size, fill=1),
        inbox.put(contexts - prompts, size),
    )
    states = _put_states(inbox, items, scratch_state, size)
    prefixes = _put_prefixes(inbox, items, size) if has_prefixes else None
    for row, slot in enumerate(slots):
        slot.row, slot.sampled_step = row, step
    lengths = HostLengths(contexts, np.ones(len(items), np.int32))
    return _decode_inputs(sections, block_tables, int(contexts.max()), lengths, states, prefixes)


def reserve_decode(
    inbox: Inbox,
    block_tables: Tensor,
    size: int,
    max_context_len: int,
    scratch_state: int | None = None,
    *,
    has_prefixes: bool = False,
) -> StepInputs:
    """Returns where `pack_decode` puts a step of ``size`` rows, for its capture; sends rows that are all padding."""
    inbox.begin()
    scratch = block_tables.shape[0] - 1
    sections = (
        inbox.put([], size),
        inbox.put([], size, fill=scratch),
        inbox.put([], size),
        inbox.put([], size, fill=1),
        inbox.put([], size),
    )
    states = _put_states(inbox, [], scratch_state, size)
    prefixes = _put_prefixes(inbox, [], size) if has_prefixes else None
    inbox.send()
    return _decode_inputs(sections, block_tables, max_context_len, None, states, prefixes)


def _decode_inputs(
    sections: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    block_tables: Tensor,
    max_context_len: int,
    host: HostLengths | None,
    states: StepStates | None,
    prefixes: PrefixTokens | None,
) -> StepInputs:
    tokens, slots, positions, contexts, generated = sections
    size = tokens.shape[0]
    attention = AttentionStep(
        block_tables=block_tables,
        table_rows=slots,
        context_lens=contexts,
        query_start=contexts[:0],
        num_decode=size,
        num_tokens=size,
        max_query_len=1,
        max_context_len=max_context_len,
        host=host,
    )
    return StepInputs(tokens, slots, positions, attention, None, size, None, slots, generated, size, states, prefixes)


def _put_states(
    inbox: Inbox, items: SequenceOf[ScheduledSequence], scratch: int | None, size: int
) -> StepStates | None:
    """Packs where the items' recurrent states are; padding, and dry runs, use the scratch slot."""
    if scratch is None:
        return None
    slots = [item.sequence.state_slot for item in items]
    return StepStates(
        inbox.put([slot if slot >= 0 else scratch for slot in slots], size, fill=scratch),
        inbox.put([int(item.start == 0) for item in items], size, fill=1),
    )


def _put_prefixes(
    inbox: Inbox, items: SequenceOf[ScheduledSequence], size: int, owners: np.ndarray | None = None
) -> PrefixTokens:
    """Packs the items' prefixes for each token: token i is of item ``owners[i]``; None: of item i."""
    fields = ([item.sequence.num_prefix_tokens for item in items], [item.sequence.mask_place for item in items])
    lengths, places = (np.array(values, np.int32) for values in fields)
    if owners is not None:
        lengths, places = lengths[owners], places[owners]
    return PrefixTokens(inbox.put(lengths, size), inbox.put(places, size))


def pack_mixed(
    inbox: Inbox,
    block_tables: Tensor,
    items: SequenceOf[ScheduledSequence],
    slots: SequenceOf[Slot],
    scratch_state: int | None = None,
    *,
    has_prefixes: bool = False,
) -> StepInputs:
    """Packs any step; items that compute one token and come first are attended to as decoding ones."""
    tokens, lengths = _token_ids(items, slots), np.array([item.num_tokens for item in items], np.int32)
    starts = np.array([item.start for item in items], np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)  # last row of each item, plus one
    contexts = starts + lengths
    indices = np.array([slot.index for slot in slots], np.int32)
    owners = np.repeat(np.arange(len(items)), lengths)
    positions = np.arange(len(tokens), dtype=np.int32) + (contexts - ends)[owners]
    is_long = lengths > 1
    num_decode = int(is_long.argmax()) if is_long.any() else len(items)
    decode_end = int(ends[num_decode - 1]) if num_decode else 0
    attention_sections = (
        inbox.put(indices),
        inbox.put(contexts),
        inbox.put(np.concatenate(([0], ends[num_decode:] - decode_end))),
    )
    prefix = np.array([item.sequence.num_prefix_tokens for item in items], np.int32) if has_prefixes else None
    attention = AttentionStep(
        block_tables,
        *attention_sections,
        num_decode=num_decode,
        num_tokens=len(tokens),
        max_query_len=int(lengths[num_decode:].max()) if num_decode < len(items) else 1,
        max_context_len=int(contexts.max()),
        host=HostLengths(contexts, lengths, prefix),
        prefix_lens=None if prefix is None else inbox.put(prefix[num_decode:]),
    )
    states = _put_states(inbox, items, scratch_state, len(items))
    prefixes = _put_prefixes(inbox, items, len(tokens), owners) if has_prefixes else None
    rows = _LogitRows(items, slots, ends)
    return StepInputs(
        tokens=inbox.put(tokens),
        token_slots=inbox.put(indices[owners]),
        positions=inbox.put(positions),
        attention=attention,
        logit_rows=None if len(rows.logits) == len(tokens) else inbox.put(rows.logits),
        num_logits=len(rows.logits),
        sampled_rows=None if len(rows.sampled) == len(rows.logits) else inbox.put(rows.sampled),
        sampled_slots=inbox.put(indices[rows.items]),
        generated=inbox.put([contexts[i] - slots[i].num_prompt_tokens for i in rows.items]),
        num_sampled=len(rows.sampled),
        states=states,
        prefixes=prefixes,
    )


class _LogitRows:
    """Which rows need logits, and which of those are sampled on the device."""

    def __init__(self, items: SequenceOf[ScheduledSequence], slots: SequenceOf[Slot], ends: np.ndarray) -> None:
        self.logits: list[int] = []  # rows of the step
        self.sampled: list[int] = []  # of those rows
        self.items: list[int] = []  # the item of each sampled row
        for index, (item, slot) in enumerate(zip(items, slots)):
            if not item.num_logits:
                continue
            end = int(ends[index])
            self.logits += range(end - item.num_logits, end)
            if slot.is_device_sampled and item.is_sampled:
                slot.row, slot.sampled_step = len(self.sampled), slot.step
                self.sampled.append(len(self.logits) - 1)
                self.items.append(index)


def _token_ids(items: SequenceOf[ScheduledSequence], slots: SequenceOf[Slot]) -> list[int]:
    """Returns the step's tokens; only an item's last one can be pending."""
    ids: list[int] = []
    for item, slot in zip(items, slots):
        ids += item.sequence.token_ids[item.start : item.end]
        if ids[-1] < 0:
            ids[-1] = _pending(slot, slot.step)
    return ids


def _pending(slot: Slot, step: int) -> int:
    """Returns -1 - the row in which the previous step sampled a sequence's pending token."""
    if slot.sampled_step != step - 1:
        raise RuntimeError("a token is pending that the previous step did not sample on the device")
    return -1 - slot.row
