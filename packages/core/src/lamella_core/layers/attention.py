"""Attention: projects, applies rotary positions, and leaves keys, values and softmax to the runtime's context."""

from __future__ import annotations

import dataclasses

import torch

from lamella_core.config import ModelConfig
from lamella_core.context import AttentionSpec, ForwardContext
from lamella_core.kernels import ops
from lamella_core.kernels.fused import RopeCacheAfter
from lamella_core.kernels.sparsity import BlockSparsity
from lamella_core.layers.activation import sigmoid
from lamella_core.layers.head_norm import HeadNorm
from lamella_core.layers.linear import QKVParallelLinear, RowParallelLinear, Stream
from lamella_core.layers.mixer import TokenMixer
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.rotary import Rotation
from lamella_core.layers.sharding import ShardSpec, replicated, split_heads


class Attention(TokenMixer):
    """Grouped-query attention (Ainslie et al. 2023), heads split over the tensor-parallel ranks: [T, H] -> [T, H].

    With a float8 KV cache ``kv_scales`` [2] float32 are what keys and values are divided by before they are rounded.

    Args:
        config: of the whole model.
        index: layer number in the whole model.
        name: dotted path of this module.
        qkv_bias: whether the query, key and value projections have one.
        out_bias: whether the output projection has one.
        scale: multiplies the scores; by default ``head_dim ** -0.5``.
        sliding_window: last keys a query sees, its own included; None: all.
        is_chunked: see `AttentionSpec`.
        softcap: scores become softcap * tanh(scores / softcap); None: they stay.
        sparsity: which keys each of all ranks' heads sees; None: all.
        q_norm: of the queries, before they rotate.
        k_norm: of the keys, likewise.
        use_rope: False for a layer without positions in a model that rotates in others.
        alibi_slopes: of all heads [Hq of all ranks] float32, see `alibi_slopes`; None: no ALiBi.
        rounds_alibi: see `AttentionSpec`.
        clip_qkv: queries, keys and values are clamped to +-clip_qkv as they are projected; None: they stay.
        has_gate: each head's result is multiplied by the sigmoid of as many numbers, projected beside its query.
        has_sinks: each head's softmax has one more column, of a learned score and without a value (see `sinks`).
    """

    takes_stream = True

    def __init__(  # noqa: PLR0913 - by keyword, most models leave most out
        self,
        config: ModelConfig,
        index: int,
        *,
        name: str,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        sliding_window: int | None = None,
        is_chunked: bool = False,
        softcap: float | None = None,
        sparsity: BlockSparsity | None = None,
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
        use_rope: bool = True,
        alibi_slopes: torch.Tensor | None = None,
        rounds_alibi: bool = False,
        clip_qkv: float | None = None,
        has_sinks: bool = False,
        has_gate: bool = False,
    ) -> None:
        super().__init__()
        tp = config.mapping.tp_size
        first_head = config.mapping.tp_rank * (config.num_attention_heads // tp)
        self.spec = AttentionSpec(
            layer_idx=index,
            num_heads=config.num_attention_heads // tp,
            num_kv_heads=max(1, config.num_key_value_heads // tp),
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5 if scale is None else scale,
            sliding_window=sliding_window,
            is_chunked=is_chunked,
            softcap=softcap,
            sparsity=sparsity and dataclasses.replace(sparsity, first_head=first_head),
            rounds_alibi=rounds_alibi,
        )
        self.q_norm, self.k_norm = q_norm, k_norm
        self.use_rope = use_rope
        self.clip_qkv = clip_qkv
        self._slopes = None if alibi_slopes is None else alibi_slopes.chunk(tp)[config.mapping.tp_rank]
        sinks = split_heads(config.num_attention_heads, 1, tp, config.mapping.tp_rank, name="q")
        self.sinks = empty_parameter(ShardSpec(dims=((sinks,),)), config.torch_dtype) if has_sinks else None
        gates = (self.spec.num_heads,) if has_gate else ()
        self.heads = (self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads, *gates)
        self.qkv_proj = QKVParallelLinear(qkv_bias, has_gate, config=config, name=f"{name}.qkv_proj")
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            out_bias,
            config=config,
            name=f"{name}.o_proj",
        )
        quantized = config.quantization.kv_cache_quant_algo is not None
        self.kv_scales: Parameter | None = empty_parameter(replicated(2), torch.float32) if quantized else None

    @property
    def has_plain_scores(self) -> bool:
        """Whether scores are products of queries and keys alone, of all keys up to the query's that a window leaves."""
        spec = self.spec
        is_bare = self._slopes is None and self.sinks is None and not spec.softcap
        return is_bare and spec.sparsity is None and not spec.is_latent

    @property
    def input_scale(self) -> torch.Tensor | None:
        """Scale with which x may also come as float8, see `Linear.input_scale`."""
        return self.qkv_proj.input_scale

    def leave_sum(self) -> bool:
        self.o_proj.reduce = False
        return True

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
        stream: Stream | None = None,
    ) -> torch.Tensor:
        """Returns [T, H], or [R, H] of the tokens ``rows`` [R] alone.

        ``rotation`` is None where positions enter in another way.
        """
        if self._slopes is not None and self._slopes.device != x.device:
            self._slopes = self._slopes.to(x.device)
        out = self._attend_placed(x, rotation, ctx)
        if out is None:
            out = self._attend(x, rotation, ctx)
        out = out.reshape(x.shape[0], self.spec.num_heads * self.spec.head_dim)
        if rows is not None:
            out = ops.take_rows(out, rows)
            if not out.shape[0]:
                return torch.empty(0, self.o_proj.out_features_local, dtype=self.o_proj.dtype, device=x.device)
        return self.o_proj(out, ctx, stream)

    def _attend_placed(self, x: torch.Tensor, rotation: Rotation | None, ctx: ForwardContext) -> torch.Tensor | None:
        """Does what `_attend` does, with rotation and the write to the cache in the projection's kernel.

        None, and nothing done, where something comes between, or where that is not faster or not possible.
        """
        if self._adapts_heads or self._query_scale(rotation) is not None or not self.qkv_proj.is_fused(x.shape[0]):
            return None
        place = ctx.kv_place(self.spec, self.kv_scales)
        if place is None:
            return None
        q = self.qkv_proj.rotated(x, RopeCacheAfter(self.spec.num_heads, place, self._own(rotation)))
        if q is None:
            return None
        return place.attend(
            q.view(-1, self.spec.num_heads, self.spec.head_dim),
            alibi_slopes=self._slopes,
            sink_logits=self.sinks,
            out_scale=self.o_proj.input_scale,
        )

    def _attend(self, x: torch.Tensor, rotation: Rotation | None, ctx: ForwardContext) -> torch.Tensor:
        """Returns attention's result before the output projection: [T, Hq, D]."""
        spec, tokens = self.spec, x.shape[0]
        qkv = self.qkv_proj(x, ctx)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v, *gates = qkv.view(tokens, sum(self.heads), spec.head_dim).split_with_sizes(self.heads, dim=1)
        if self.q_norm is not None:
            q = self.q_norm(q, ctx)
        if self.k_norm is not None:
            k = self.k_norm(k, ctx)
        scale = self._query_scale(rotation)
        if scale is not None:
            q = (q * scale).to(q.dtype)
        out = ctx.attend(
            spec,
            q,
            k,
            v,
            rotation=self._own(rotation),
            alibi_slopes=self._slopes,
            sink_logits=self.sinks,
            kv_scales=self.kv_scales,
            out_scale=None if gates else self.o_proj.input_scale,
        )
        return out * sigmoid(gates[0]) if gates else out

    @property
    def _adapts_heads(self) -> bool:
        """Whether anything but rotation changes queries or keys, or more than they and values are projected."""
        is_changed = self.clip_qkv is not None or self.q_norm is not None or self.k_norm is not None
        return is_changed or len(self.heads) > 3

    def _query_scale(self, rotation: Rotation | None) -> torch.Tensor | None:
        """Returns what multiplies this layer's queries in the step, [T, 1, 1] float32."""
        own = self._own(rotation)
        if own is not None:
            return own.query_scale
        return rotation.unrotated_scale if rotation is not None else None

    def _own(self, rotation: Rotation | None) -> Rotation | None:
        """Returns this layer's rotation among those of the step."""
        if rotation is None or not self.use_rope:
            return None
        is_local = rotation.local is not None and self.spec.sliding_window is not None
        return rotation.local if is_local else rotation
