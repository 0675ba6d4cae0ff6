"""Attention through the kernels of `lamella_core.kernels.triton.attention`: no host planning, any GPU triton serves.

Long prompts on Hopper go through a CUDA kernel of ours, see `HopperPrompts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella_core.kernels.triton.attention.decode import Workspace, decode_attention, decode_workspace
from lamella_core.kernels.triton.attention.mla import latent_decode, latent_prefill
from lamella_core.kernels.triton.attention.mla_plan import Workspace as LatentWorkspace
from lamella_core.kernels.triton.attention.mla_plan import latent_workspace
from lamella_core.kernels.triton.attention.prefill import prefill_attention, ragged_attention
from lamella_executor.attention.backend import AttentionStep, LayerCall
from lamella_executor.attention.hopper_prompts import BegunMemory, HopperPrompts


class TritonAttention:
    """An `AttentionBackend`; owns the memory in which parts of long contexts are joined.

    Steps use that memory one after another, as they are enqueued on one stream.
    """

    name = "triton"
    is_capturable = True

    def __init__(self) -> None:
        self.begun_memory = BegunMemory()
        self._workspaces: dict[tuple[int, int, int], Workspace] = {}  # by heads, key/value heads and head size
        self._latent_workspaces: dict[tuple[int, int], LatentWorkspace] = {}  # by heads and value size

    def begin(self, step: AttentionStep) -> _TritonStep:
        return _TritonStep(self, step)

    def workspace(self, layer: LayerCall, device: torch.device) -> Workspace:
        """Returns the memory for layers of this shape; the first call must not be captured."""
        spec = layer.spec
        key = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        if key not in self._workspaces:
            self._workspaces[key] = decode_workspace(*key, device)
        return self._workspaces[key]

    def latent_workspace(self, layer: LayerCall, device: torch.device) -> LatentWorkspace:
        """Returns what `workspace` does, for layers with a latent cache."""
        key = (layer.spec.num_heads, layer.spec.out_dim)
        if key not in self._latent_workspaces:
            self._latent_workspaces[key] = latent_workspace(*key, device)
        return self._latent_workspaces[key]


class _TritonStep:
    def __init__(self, backend: TritonAttention, step: AttentionStep) -> None:
        self._backend = backend
        self._step = step
        rows, lengths, num_decode = step.table_rows, step.context_lens, step.num_decode
        self._decode = (step.block_tables, rows[:num_decode], lengths[:num_decode])
        self._num_prompts = rows.shape[0] - num_decode
        self._num_whole = step.num_whole
        self._hopper_prompts = HopperPrompts(step, backend.begun_memory)
        self._longest = (step.max_context_len, step.max_query_len)  # context of prompts, whole prompt
        if step.host is not None and self._num_prompts:
            whole = step.host.query[len(step.host.query) - self._num_whole :]
            self._longest = (int(step.host.context[num_decode:].max()), int(whole.max(initial=0)))

    def decode(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        spec, window = layer.spec, layer.window
        if spec.is_latent:
            return latent_decode(
                q, layer.k_cache, spec.out_dim, *self._decode,
                scale=spec.scale, max_context_len=self._step.max_context_len, sliding_window=window.length,
                num_sinks=window.num_sinks, kv_scales=layer.kv_scales,
                workspace=self._backend.latent_workspace(layer, q.device), out=out,
            )  # fmt: skip
        return decode_attention(
            q, layer.k_cache, layer.v_cache, *self._decode,
            scale=spec.scale, max_context_len=self._step.max_context_len,
            sliding_window=window.length, is_chunked=window.is_chunked, num_sinks=window.num_sinks,
            softcap=spec.softcap or 0.0, sparsity=spec.sparsity,
            alibi_slopes=layer.alibi_slopes, rounds_alibi=spec.rounds_alibi, sink_logits=layer.sink_logits,
            kv_scales=layer.kv_scales, out_scale=layer.out_scale,
            workspace=self._backend.workspace(layer, q.device), out=out,
        )  # fmt: skip

    def leads_prefill(self, q: Tensor, layer: LayerCall) -> bool:
        return self._hopper_prompts.serves(q, layer)

    def prefill(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        result = self._hopper_prompts.prefill(q, layer, out)
        if result is not None:
            return result
        if layer.own is None or self._num_whole == 0 or layer.k_cache.dtype == q.dtype:
            return self._over_cache(q, layer, out, self._num_prompts)
        begun = self._num_prompts - self._num_whole
        if begun:
            out = self._over_cache(q, layer, out, begun)
        spec, window = layer.spec, layer.window
        return ragged_attention(
            q, *layer.own, self._step.query_start[begun:],
            scale=spec.scale, max_query_len=self._longest[1],
            sliding_window=window.length, is_chunked=window.is_chunked, num_sinks=window.num_sinks,
            softcap=spec.softcap or 0.0, sparsity=spec.sparsity, prefix_lens=self._prefixes(begun, self._num_prompts),
            alibi_slopes=layer.alibi_slopes, rounds_alibi=spec.rounds_alibi, sink_logits=layer.sink_logits,
            out_scale=layer.out_scale, out=out,
        )  # fmt: skip

    def _over_cache(self, q: Tensor, layer: LayerCall, out: Tensor | None, count: int) -> Tensor:
        """Attention of the first ``count`` prompts; rows of others are left as they are."""
        spec, window, step = layer.spec, layer.window, self._step
        rows, lengths = (x[step.num_decode : step.num_decode + count] for x in (step.table_rows, step.context_lens))
        if spec.is_latent:
            return latent_prefill(
                q, layer.k_cache, spec.out_dim, step.block_tables, rows, step.query_start[: count + 1], lengths,
                max_query_len=step.max_query_len, scale=spec.scale, sliding_window=window.length,
                num_sinks=window.num_sinks, kv_scales=layer.kv_scales, out=out,
            )  # fmt: skip
        return prefill_attention(
            q, layer.k_cache, layer.v_cache, step.block_tables, rows, step.query_start[: count + 1], lengths,
            scale=spec.scale, max_query_len=step.max_query_len, max_context_len=self._longest[0],
            sliding_window=window.length, is_chunked=window.is_chunked, num_sinks=window.num_sinks,
            softcap=spec.softcap or 0.0, sparsity=spec.sparsity, prefix_lens=self._prefixes(0, count),
            alibi_slopes=layer.alibi_slopes, rounds_alibi=spec.rounds_alibi, sink_logits=layer.sink_logits,
            kv_scales=layer.kv_scales, out_scale=layer.out_scale, out=out,
        )  # fmt: skip

    def _prefixes(self, first: int, last: int) -> Tensor | None:
        """Returns the prefix lengths of these prompts; None: there are no prefixes."""
        lengths = self._step.prefix_lens
        return None if lengths is None else lengths[first:last]
