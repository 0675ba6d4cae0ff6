"""Paged attention on a CPU: the KV cache's tensors, one step's metadata, and the ForwardContext over both.

Legend: T tokens of the step (packed), S sequences in it, B longest block table, Hq and Hkv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lamella_core.context import AttentionSpec, Communicator, RecurrentStep, StateSpec
from lamella_core.errors import ConfigError
from lamella_core.kernels import fp8
from lamella_core.kernels.cpu import ops
from lamella_core.layers.rotary import Rotation
from lamella_core.prefix import PrefixTokens
from lamella_executor.attention.memory import reserve
from lamella_executor.attention.states import RecurrentStates
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import EVICTED_BLOCK


class PagedKvCache:
    """Keys and values of every attention layer, in blocks; owns the memory. Latent layers have keys alone.

    Memory is reserved but not touched: the machine provides pages as blocks are first written.
    """

    def __init__(
        self,
        specs: SequenceOf[AttentionSpec],
        num_blocks: int,
        tokens_per_block: int,
        dtype: torch.dtype,
        states: RecurrentStates | None = None,  # of layers without keys and values, beside them
    ) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.states = states
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer_idx -> k, v [num_blocks, Hkv, tokens_per_block, D]
        self._stored: list[Tensor] = []  # those of them that have memory of their own
        for spec in specs:
            shape = (num_blocks, spec.num_kv_heads, tokens_per_block, spec.head_dim)
            keys = reserve(shape, dtype)
            values = keys[..., spec.head_dim - spec.out_dim :] if spec.is_latent else reserve(shape, dtype)
            self._layers[spec.layer_idx] = (keys, values)
            self._stored += [keys] if spec.is_latent else [keys, values]

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a layer, each [num_blocks, Hkv, tokens_per_block, D].

        Values of a latent layer are a view of its keys.
        """
        return self._layers[layer_idx]

    def copy_blocks(self, copies: SequenceOf[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) in every layer, in order: a later copy sees the earlier ones."""
        for source, destination in copies:
            for cache in self._stored:
                cache[destination].copy_(cache[source])


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The packed inputs of one step; made once, read by every layer."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block * tokens_per_block + offset, where a token's keys and values go
    block_tables: Tensor  # [S, B] int32; EVICTED_BLOCK where the window has passed, and as padding
    query_start: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32, keys of each sequence including this step's
    logit_rows: Tensor | None  # [R] int64, rows whose logits are wanted; None: all
    state_slots: Tensor | None = None  # [S] int32, where the sequences' states are; None: they have none
    is_first: Tensor | None = None  # [S] bool, with that: the sequence starts in this step
    prefixes: PrefixTokens | None = None  # of a model that has some
    prefix_lens: Tensor | None = None  # [S] int32, if some token of the step sees what comes after it in its prefix


def make_batch(plan: StepPlan, tokens_per_block: int, *, has_prefixes: bool = False) -> StepBatch:
    """Packs the items of a plan, in their order; ``has_prefixes`` says that the model wants them."""
    items = plan.items
    count = len(items)
    starts = np.fromiter((item.start for item in items), np.int64, count)
    lengths = np.fromiter((item.num_tokens for item in items), np.int64, count)
    query_start = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=query_start[1:])
    ids: list[int] = []
    for item in items:
        ids += item.sequence.token_ids[item.start : item.start + item.num_tokens]
    tables = np.full((count, max(len(item.sequence.blocks) for item in items)), EVICTED_BLOCK, np.int32)
    for row, item in zip(tables, items):
        blocks = item.sequence.blocks
        row[: len(blocks)] = blocks
    owner = np.repeat(np.arange(count), lengths)  # the item of each token
    positions = np.arange(len(ids)) + (starts - query_start[:-1])[owner]
    slots = tables[owner, positions // tokens_per_block].astype(np.int64) * tokens_per_block
    slots += positions % tokens_per_block
    state_slots = np.fromiter((item.sequence.state_slot for item in items), np.int32, count)
    has_states = count > 0 and state_slots[0] >= 0
    prefixes, prefix_lens = _prefixes(items, starts, owner) if has_prefixes else (None, None)
    return StepBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        block_tables=torch.from_numpy(tables),
        query_start=torch.from_numpy(query_start.astype(np.int32)),
        context_lens=torch.from_numpy((starts + lengths).astype(np.int32)),
        logit_rows=_logit_rows(plan, query_start),
        state_slots=torch.from_numpy(state_slots) if has_states else None,
        is_first=torch.from_numpy(starts == 0) if has_states else None,
        prefixes=prefixes,
        prefix_lens=prefix_lens,
    )


def _prefixes(
    items: SequenceOf[ScheduledSequence], starts: np.ndarray, owner: np.ndarray
) -> tuple[PrefixTokens, Tensor | None]:
    """Returns `StepBatch.prefixes` and ``prefix_lens``; ``owner`` [T] is the item of each token."""
    lengths = np.array([item.sequence.num_prefix_tokens for item in items], np.int64)
    places = np.array([item.sequence.mask_place for item in items], np.int64)
    tokens = PrefixTokens(torch.from_numpy(lengths[owner]), torch.from_numpy(places[owner]))
    return tokens, torch.from_numpy(lengths.astype(np.int32)) if np.any(starts < lengths) else None


def _logit_rows(plan: StepPlan, query_start: np.ndarray) -> Tensor | None:
    """Returns the last ``num_logits`` rows of each item, [R]; None if those are all rows."""
    if all(item.num_logits == item.num_tokens for item in plan.items):
        return None
    rows = [np.arange(end - item.num_logits, end) for item, end in zip(plan.items, query_start[1:])]
    return torch.from_numpy(np.concatenate(rows))


@dataclass(frozen=True)
class LayerWindow:
    """What a layer's queries see: the last ``length`` keys (0: all), or their chunk; and the first ``num_sinks``."""

    length: int = 0
    num_sinks: int = 0
    is_chunked: bool = False


def layer_windows(
    specs: SequenceOf[AttentionSpec], max_attention_window: tuple[int, ...] | None, num_sinks: int
) -> dict[int, LayerWindow]:
    """Resolves each layer's window: the smaller of the model's own and the configured one.

    Layer i of the model, on whichever stage it is, takes entry i of the configured ones, cycled. The sink tokens stay
    visible beside either.

    Raises:
        ConfigError: a window is configured for a layer that attends in chunks.
    """
    windows: dict[int, LayerWindow] = {}
    for spec in specs:
        limits = [spec.sliding_window] if spec.sliding_window else []
        if spec.is_chunked:
            if max_attention_window:
                raise ConfigError(
                    f"KvCacheConfig.max_attention_window is {max_attention_window}, but layer {spec.layer_idx} attends "
                    f"in chunks of {spec.sliding_window} tokens; leave it out"
                )
            windows[spec.layer_idx] = LayerWindow(limits[0], is_chunked=True)
            continue
        if max_attention_window:
            limits.append(max_attention_window[spec.layer_idx % len(max_attention_window)])
        windows[spec.layer_idx] = LayerWindow(min(limits), num_sinks) if limits else LayerWindow()
    return windows


class PagedAttentionContext:
    """One step's `lamella_core.context.ForwardContext` over the paged cache."""

    def __init__(
        self, cache: PagedKvCache, batch: StepBatch, windows: dict[int, LayerWindow], tp: Communicator
    ) -> None:
        self._cache = cache
        self._batch = batch
        self._windows = windows
        self.tp = tp

    @property
    def prefixes(self) -> PrefixTokens:
        """Where the step's tokens are in texts with prefixes.

        Raises:
            RuntimeError: the model has none.
        """
        if self._batch.prefixes is None:
            raise RuntimeError("the step was packed for a model without prefixes")
        return self._batch.prefixes

    def attend(  # noqa: PLR0913 - as the protocol has it
        self,
        spec: AttentionSpec,
        q: Tensor,  # [T, Hq, D]
        k: Tensor,  # [T, Hkv, D]
        v: Tensor | None,  # [T, Hkv, D]; None: the cache is latent
        *,
        rotation: Rotation | None = None,
        alibi_slopes: Tensor | None = None,
        sink_logits: Tensor | None = None,
        kv_scales: Tensor | None = None,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        """Rotates, writes this step's keys and values, then attends over the cache; returns [T, Hq, D] in q's dtype.

        With ``kv_scales`` the cache holds what float8 keeps of keys and values, but in the model's dtype: the numbers
        are those of a GPU, the memory is not less.
        """
        if rotation is not None:
            rotation.apply_(q, k)
        if kv_scales is not None:
            k = fp8.simulate(k, kv_scales[0])
            v = None if v is None else fp8.simulate(v, kv_scales[1])
        batch, window = self._batch, self._windows[spec.layer_idx]
        keys, values = self._cache.layer(spec.layer_idx)
        ops.write_kv(k, v, keys, values, batch.slots)
        return ops.paged_attention(
            q, keys, values, batch.block_tables, batch.query_start, batch.context_lens, spec.scale,
            sliding_window=window.length, num_sinks=window.num_sinks, softcap=spec.softcap or 0.0,
            alibi_slopes=alibi_slopes, sink_logits=sink_logits, is_chunked=window.is_chunked,
            prefix_lens=batch.prefix_lens, sparsity=spec.sparsity, rounds_alibi=spec.rounds_alibi,
        )  # fmt: skip

    def kv_place(self, spec: AttentionSpec, kv_scales: Tensor | None) -> None:
        """Returns None: `attend` stores keys and values."""

    def recurrent(self, spec: StateSpec) -> RecurrentStep:
        """Returns where the states of a layer are in this step.

        Raises:
            RuntimeError: the step's sequences have no slots.
        """
        batch, states = self._batch, self._cache.states
        if states is None or batch.state_slots is None or batch.is_first is None:
            raise RuntimeError(f"layer {spec.layer_idx} has states, and the step's sequences have no slots for them")
        return RecurrentStep(
            states.layer(spec.layer_idx),
            batch.state_slots,
            batch.is_first,
            batch.query_start,
            num_decode=0,
            max_query_len=batch.input_ids.shape[0],
        )
