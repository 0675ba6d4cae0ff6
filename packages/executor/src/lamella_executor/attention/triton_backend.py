"""Attention through the kernels of `lamella_core.kernels.triton.attention`: no host planning, any GPU triton serves."""

from __future__ import annotations

from lamella_core.kernels.triton.attention.decode import decode_attention
from lamella_core.kernels.triton.attention.prefill import prefill_attention
from torch import Tensor

from lamella_executor.attention.backend import AttentionStep, LayerCall


class TritonAttention:
    """An `AttentionBackend`; stateless."""

    name = "triton"
    is_capturable = True

    def begin(self, step: AttentionStep) -> _TritonStep:
        return _TritonStep(step)


class _TritonStep:
    def __init__(self, step: AttentionStep) -> None:
        self._step = step
        rows, lengths, num_decode = step.table_rows, step.context_lens, step.num_decode
        self._decode = (step.block_tables, rows[:num_decode], lengths[:num_decode])
        self._prefill = (step.block_tables, rows[num_decode:], step.query_start, lengths[num_decode:])

    def decode(self, q: Tensor, layer: LayerCall) -> Tensor:
        spec, window = layer.spec, layer.window
        return decode_attention(
            q, layer.k_cache, layer.v_cache, *self._decode,
            scale=spec.scale, max_context_len=self._step.max_context_len,
            sliding_window=window.length, num_sinks=window.num_sinks, softcap=spec.softcap or 0.0,
            alibi_slopes=layer.alibi_slopes, sink_logits=layer.sink_logits,
            kv_scales=layer.kv_scales, out_scale=layer.out_scale,
        )  # fmt: skip

    def prefill(self, q: Tensor, layer: LayerCall) -> Tensor:
        spec, window = layer.spec, layer.window
        return prefill_attention(
            q, layer.k_cache, layer.v_cache, *self._prefill,
            scale=spec.scale, max_query_len=self._step.max_query_len,
            sliding_window=window.length, num_sinks=window.num_sinks, softcap=spec.softcap or 0.0,
            alibi_slopes=layer.alibi_slopes, sink_logits=layer.sink_logits,
            kv_scales=layer.kv_scales, out_scale=layer.out_scale,
        )  # fmt: skip
