"""ModelRunner: one model on one rank, over a paged KV cache on the CPU."""

from __future__ import annotations

import torch

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
        self._decode = RecordedDecode(model, cache, windows, self._tp)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Returns logits [plan.num_logits, vocab_size] float32; see `Runner.run`."""
        self._cache.copy_blocks(plan.block_copies)
        batch = make_batch(plan, self._cache.tokens_per_block)
        ctx = PagedAttentionContext(self._cache, batch, self._windows, self._tp)
        hidden = self._decode.run(batch) if all(item.num_tokens == 1 for item in plan.items) else None
        if hidden is None:
            hidden = self._model(batch.input_ids, batch.positions, ctx, rows=batch.logit_rows)  # [R, H]
        if not hidden.shape[0]:
            return torch.empty(0, self._model.config.vocab_size)
        return self._model.compute_logits(hidden, ctx)
