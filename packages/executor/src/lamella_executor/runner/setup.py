"""RunnerSetup: what a runner is made from, whatever the device."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import torch

from lamella_core.context import AttentionSpec
from lamella_core.models.base import CausalLM
from lamella_core.quantization.config import QuantAlgo
from lamella_executor.admission import EngineLimits
from lamella_executor.attention.paged_cpu import LayerWindow
from lamella_executor.attention.states import RecurrentStates
from lamella_executor.config import KvCacheConfig
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.memory import KvCacheDemand, KvCachePlan


@dataclass(frozen=True)
class RunnerSetup:
    """An engine's model and limits, resolved."""

    model: CausalLM
    specs: SequenceOf[AttentionSpec]
    windows: dict[int, LayerWindow]
    tokens_per_block: int
    limits: EngineLimits
    kv_config: KvCacheConfig
    demand: KvCacheDemand
    groups: RankGroups = field(default_factory=RankGroups.single)
    window: int | None = None  # tokens that some layer of all ranks sees at most; None: one sees everything

    def agreed(self, plan: KvCachePlan) -> KvCachePlan:
        """Returns the plan with as many blocks as the rank with the fewest has; every rank must call this."""
        return replace(plan, num_blocks=self.groups.agree_min(plan.num_blocks))

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values on a GPU."""
        if self.model.config.quantization.kv_cache_quant_algo is QuantAlgo.FP8:
            return torch.float8_e4m3fn
        return self.model.config.torch_dtype

    @property
    def num_state_slots(self) -> int:
        """Slots for recurrent states: one per sequence that computes; 0 if the model has none, on whatever rank."""
        return self.max_sequences if self.model.has_states else 0

    def make_states(self, device: torch.device | str, *, is_dry: bool = False) -> RecurrentStates | None:
        """Returns memory for the recurrent states of this rank's layers; None if the model has none.

        For a dry run, whose sequences have no slots, there is scratch alone.
        """
        if not self.model.has_states:
            return None
        return RecurrentStates(self.model.state_specs(), 0 if is_dry else self.num_state_slots, device)

    @property
    def max_sequences(self) -> int:
        """Sequences of one step at most: samples, or beams."""
        limits = self.limits
        return min(limits.max_batch_size * limits.max_beam_width, limits.max_num_tokens)
