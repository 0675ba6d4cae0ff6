"""ModelRunner: one model on one rank, over a paged KV cache on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella_core.config import ModelConfig
from lamella_core.context import Communicator, SingleRank
from lamella_core.models.base import CausalLM
from lamella_executor.attention.paged_cpu import LayerWindow, PagedAttentionContext, PagedKvCache, make_batch
from lamella_executor.runner.recorded import RecordedDecode
from lamella_executor.scheduler.plan import StepPlan


class ModelRunner:
    """Runs step plans: decoding steps from recordings where the model allows, everything else eagerly."""

    def __init__(
        self,
        model: CausalLM,
        cache: PagedKvCache,
        windows: dict[int, LayerWindow],
        tp: Communicator | None = None,
    ) -> None:
        """Takes over the cache; the model is only read.

        Args:
            model: one rank's model, weights in place.
            cache: keys and values of the model's attention layers.
            windows: by layer index, see `layer_windows`.
            tp: tensor-parallel group; default: this process alone.
        """
        self._model = model
        self._cache = cache
        self._windows = windows
        self._tp = tp or SingleRank()
        self._has_prefixes = model.config.prefix_rule is not None
        self._decode = RecordedDecode(model, cache, windows, self._tp)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration on this rank."""
        return self._model.config

    def run(self, plan: StepPlan) -> Tensor:
        """Returns logits [plan.num_logits, vocab_size] float32; see `Runner.run`."""
        return self.run_stage(plan)

    @torch.inference_mode()
    def run_stage(self, plan: StepPlan, hidden: Tensor | None = None) -> Tensor:
        """Computes this rank's layers.

        Args:
            plan: the step.
            hidden: [T, H] from the previous pipeline stage; None on the first one.

        Returns:
            What `run` returns; on a stage before the last, hidden states [T, H], the next one's ``hidden``.
        """
        self._cache.copy_blocks(plan.block_copies)
        if plan.state_copies and self._cache.states is not None:
            self._cache.states.copy(*(torch.tensor(side) for side in zip(*plan.state_copies)))
        batch = make_batch(plan, self._cache.tokens_per_block, has_prefixes=self._has_prefixes)
        ctx = PagedAttentionContext(self._cache, batch, self._windows, self._tp)
        is_last = self._model.lm_head is not None
        rows = batch.logit_rows if is_last else None  # None: all
        out: Tensor | None = None
        if rows is None and all(item.num_tokens == 1 for item in plan.items):
            out = self._decode.run(batch, hidden)
        if out is None:
            out = self._model(batch.input_ids, batch.positions, ctx, hidden=hidden, rows=rows)  # [R, H]
        if not is_last:
            return out
        if not out.shape[0]:
            return torch.empty(0, self._model.config.vocab_size)
        return self._model.compute_logits(out, ctx)
