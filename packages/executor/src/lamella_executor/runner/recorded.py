"""Decoding steps on a CPU, replayed from recordings of their kernel calls (see `lamella_core.kernels.cpu.replay`)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella_core.context import Communicator
from lamella_core.kernels.cpu.replay import NotReplayableError, Tape, record
from lamella_core.layers.rotary import Rotation
from lamella_core.models.base import CausalLM
from lamella_executor.attention.paged_cpu import LayerWindow, PagedAttentionContext, PagedKvCache, StepBatch
from lamella_executor.sequence import EVICTED_BLOCK

logger = logging.getLogger(__name__)

MOST_ROWS = 16  # larger steps are long enough for the interpreter not to matter
MOST_TAPES = 32
_LEAST_TABLE_WIDTH = 16  # blocks; wider tables come in powers of two


@dataclass(frozen=True)
class _Key:
    """What the recorded calls depend on, beside the model and the cache."""

    rows: int
    table_width: int
    num_threads: int


class RecordedDecode:
    """Recordings of steps that compute one token of each sequence, made when such a step comes for the second time.

    Args:
        model: only read; its layers may use nothing but native kernels, or every step runs eagerly.
        cache: keys and values.
        windows: by layer index.
        tp: tensor-parallel group; recordings are made only for a group of one.
    """

    def __init__(self, model: CausalLM, cache: PagedKvCache, windows: dict[int, LayerWindow], tp: Communicator) -> None:
        self._model = model
        self._cache = cache
        self._windows = windows
        self._tp = tp
        self._steps: dict[_Key, _RecordedStep] = {}  # the least recently used first
        self._seen: set[_Key] = set()
        # A recording computes once by itself, and states of sequences would advance twice. Prefixes are not recorded.
        has_more = cache.states is not None or model.config.prefix_rule is not None
        self._is_possible = tp.size == 1 and not has_more and model.lm_head is not None

    def run(self, batch: StepBatch, hidden: Tensor | None = None) -> Tensor | None:
        """Returns hidden states [T, H] of a batch of single tokens, or None if it must run eagerly.

        The result is overwritten by the next step of the same size. ``hidden`` [T, H] comes from the pipeline stage
        before; on a stage before the last nothing is recorded, for PyTorch adds up what goes to the next one.
        """
        rows, width = batch.block_tables.shape
        if rows > MOST_ROWS or not self._is_possible:
            return None
        width = max(_LEAST_TABLE_WIDTH, 1 << (width - 1).bit_length())
        key = _Key(rows, width, torch.get_num_threads())
        if key not in self._seen:  # most sizes pass once, while requests come and go
            self._seen.add(key)
            return None
        step = self._steps.pop(key, None)
        if step is None:
            step = self._record(key, batch, hidden)
            if step is None:
                return None
            if len(self._steps) >= MOST_TAPES:
                del self._steps[next(iter(self._steps))]
        self._steps[key] = step
        return step.run(batch, hidden)

    def _record(self, key: _Key, batch: StepBatch, hidden: Tensor | None) -> _RecordedStep | None:
        try:
            return _RecordedStep(self._model, self._cache, self._windows, self._tp, key, batch, hidden)
        except NotReplayableError as error:
            logger.debug("decoding steps of %s run eagerly: %s", type(self._model).__name__, error)
            self._is_possible = False
            return None


class _RecordedStep:
    """One recording and the buffers that its inputs go to."""

    def __init__(
        self,
        model: CausalLM,
        cache: PagedKvCache,
        windows: dict[int, LayerWindow],
        tp: Communicator,
        key: _Key,
        batch: StepBatch,
        hidden: Tensor | None,
    ) -> None:
        rows = key.rows
        self._model = model
        self._tables = torch.full((rows, key.table_width), EVICTED_BLOCK, dtype=torch.int32)
        self._slots = torch.empty(rows, dtype=torch.int64)
        self._context_lens = torch.empty(rows, dtype=torch.int32)
        own = StepBatch(
            input_ids=batch.input_ids,
            positions=batch.positions,
            slots=self._slots,
            block_tables=self._tables,
            query_start=torch.arange(rows + 1, dtype=torch.int32),
            context_lens=self._context_lens,
            logit_rows=None,
        )
        self._ctx = PagedAttentionContext(cache, own, windows, tp)
        first, self._rotation = self._inputs(batch, hidden)
        self._hidden = first.clone() if first is hidden else first
        self._fill(batch)
        self._tape: Tape = record(lambda: model.run_layers(self._hidden, self._rotation, self._ctx))

    def run(self, batch: StepBatch, hidden: Tensor | None) -> Tensor:
        first, rotation = self._inputs(batch, hidden)
        self._hidden.copy_(first)
        if rotation is not None and self._rotation is not None:
            self._rotation.copy_(rotation)
        self._fill(batch)
        return self._tape.replay()

    def _inputs(self, batch: StepBatch, hidden: Tensor | None) -> tuple[Tensor, Rotation | None]:
        """Returns the first layer's input and the rotations, which PyTorch looks up."""
        model = self._model
        if hidden is None:
            hidden = model.embed(batch.input_ids, batch.positions, self._ctx)
        return hidden, model.rotary(batch.positions) if model.rotary is not None else None

    def _fill(self, batch: StepBatch) -> None:
        width = batch.block_tables.shape[1]
        self._tables[:, :width] = batch.block_tables
        self._tables[:, width:] = EVICTED_BLOCK
        self._slots.copy_(batch.slots)
        self._context_lens.copy_(batch.context_lens)
