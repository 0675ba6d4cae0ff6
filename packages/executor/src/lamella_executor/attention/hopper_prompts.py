"""Prompts through `lamella_core.kernels.cuda.prompt_attention`, on the GPUs that have it.

Prompts that begin in a step attend over their own keys and values. Those of begun ones come out of the cache first, to
memory where they lie side by side, in the dtype of products; all of a step's prompts are then one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella_core.kernels.cuda.prompt_attention import BegunKeys, prompt_attention, serves
from lamella_core.kernels.triton.attention.gather import gather_keys
from lamella_executor.attention.backend import AttentionStep, LayerCall

# Tokens of a step's longest prompt from which on this is faster than Triton's kernels. On an H100 (32 heads over 8 of
# 128, microseconds, Triton's in brackets): 4 x 2048 273 (559), 8 x 1000 155 (199), 16 x 512 112 (125), 32 x 256 91
# (91), 64 x 128 82 (76); over a float8 cache, gathering included, 4 x 500 after 500 68 (103), 512 after 15,500 221
# (399).
LEAST_PROMPT = 512
BEGUN_BYTES = 64 << 20  # of memory for the keys and values of a step's begun prompts


class BegunMemory:
    """Where the keys and values of begun prompts lie side by side; layers and steps use it one after another."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def get(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns keys and values, [tokens, Hkv, D] each."""
        key = (num_kv_heads, head_dim, dtype)
        if key not in self._pairs:
            shape = (BEGUN_BYTES // (2 * num_kv_heads * head_dim * dtype.itemsize), num_kv_heads, head_dim)
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            self._pairs[key] = (keys, values)
        return self._pairs[key]


class HopperPrompts:
    """Attention of one step's prompts."""

    def __init__(self, step: AttentionStep, memory: BegunMemory) -> None:
        self._step = step
        self._memory = memory
        self._is_worth_it = False
        self._begun: slice | None = None  # sequences of the step
        self._num_keys = self._most_keys = 0  # of begun prompts: all, and of one
        if step.host is None or step.prefix_lens is not None:
            return
        first, last = step.num_decode, len(step.host.query) - step.num_whole
        self._is_worth_it = int(step.host.query[first:].max(initial=0)) >= LEAST_PROMPT
        if first < last:
            lengths = step.host.context[first:last]
            self._begun, self._num_keys, self._most_keys = slice(first, last), int(lengths.sum()), int(lengths.max())

    def serves(self, q: Tensor, layer: LayerCall) -> bool:
        """Whether `prefill` computes what it is asked for, and faster than other kernels."""
        heads = layer.spec.num_kv_heads
        if not self._is_worth_it or not layer.is_plain or not serves(q, heads, layer.out_scale is not None):
            return False
        has_own = layer.own is not None or not self._step.num_whole
        return has_own and self._num_keys <= self._memory_for(q, layer)[0].shape[0]

    def prefill(self, q: Tensor, layer: LayerCall, out: Tensor | None) -> Tensor | None:
        """Returns what `StepAttention.prefill` does; None: another kernel serves this step better, or this layer."""
        if not self.serves(q, layer):
            return None
        memory = self._memory_for(q, layer)  # in every step, so that the first one has it
        begun = None if self._begun is None else self._gathered(self._begun, memory, q, layer)
        return prompt_attention(
            q, *(layer.own or memory), self._step.query_start,
            scale=layer.spec.scale, begun=begun, out_scale=layer.out_scale, out=out,
        )  # fmt: skip

    def _memory_for(self, q: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor]:
        return self._memory.get(layer.spec.num_kv_heads, q.shape[2], q.dtype, q.device)

    def _gathered(self, begun: slice, memory: tuple[Tensor, Tensor], q: Tensor, layer: LayerCall) -> BegunKeys:
        step = self._step
        lengths = step.context_lens[begun]
        gather_keys(
            memory, q, layer.k_cache, layer.v_cache, step.block_tables, step.table_rows[begun], lengths,
            max_context_len=self._most_keys,
        )  # fmt: skip
        return BegunKeys(*memory, lengths, layer.kv_scales)
