"""Multi-head latent attention (MLA, DeepSeek-V2, 2024): all heads' keys and values come from one small latent vector.

The cache holds, per token, a key of R rotated numbers and the L numbers of the normed latent: one key/value head, which
every tensor-parallel rank keeps in full. A head's unrotated key is a matrix times the latent, and so is its value. Both
matrices are absorbed: the query is multiplied by the first before it meets the latents, and the second is applied to
the sum over them, so that keys and values of heads are never made. All tokens go this way, whatever the chunk's length.

Shape legend: T tokens, H heads on this rank, N unrotated and R rotated numbers of a head's query, L of the latent, V of
a head's value.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lamella_core.config import ModelConfig
from lamella_core.context import AttentionSpec, ForwardContext
from lamella_core.kernels import ops
from lamella_core.kernels.gpu_matmul import cublas_stacked
from lamella_core.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear
from lamella_core.layers.mixer import TokenMixer
from lamella_core.layers.norm import RMSNorm
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.rotary import Rotation
from lamella_core.layers.sharding import HeadShard, ShardSpec, fused, replicated, split, whole
from lamella_core.quantization.config import QuantConfig

_LATENT_EPS = 1e-6  # of the norms of latents, whatever that of the model's other norms


class HeadwiseLinear(Linear):
    """x [T, H, in] -> [T, H, out]: each head by its own matrix.

    A source holds ``rows`` rows for each head, of which the matrix is those from ``first`` on.

    Never quantized: it stands between attention and a quantized product, and is small.
    """

    def __init__(
        self, in_features: int, out_features: int, *, rows: int, first: int, config: ModelConfig, name: str
    ) -> None:
        mapping = config.mapping
        heads = split(config.num_attention_heads, mapping.tp_size, mapping.tp_rank, what=f"the heads of {name}")
        self._place = (rows, first)
        plain = replace(config, quantization=QuantConfig())
        super().__init__(whole(in_features), (whole(out_features),), False, config=plain, name=name, experts=heads)

    @property
    def weight_shard(self) -> ShardSpec:
        rows, first = self._place
        dims = super().weight_shard.dims
        return HeadShard(dims, stacked_experts=True, rows=rows, first=first)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        if x.is_cuda:
            return cublas_stacked(x.transpose(0, 1), self.weight).transpose(0, 1)
        out = x.new_empty(*x.shape[:2], self.out_features_local)
        for head in range(x.shape[1]):
            out[:, head] = self.method.apply(self, x[:, head], None, head)
        return out


class LatentAttention(TokenMixer):
    """[T, hidden] -> [T, hidden], heads split over the tensor-parallel ranks; what `Attention` is for MLA.

    Args:
        config: of the whole model; its ``head_dim`` is R + L.
        index: layer number in the whole model.
        name: dotted path of this module.
        q_rank: size of the queries' own latent vector; None: they come from the hidden state directly.
        nope_dim: N.
        rope_dim: R.
        latent_dim: L.
        value_dim: V.
        scale: multiplies the scores.
        bias: whether the projections from and to the hidden state have one (that of queries only with ``q_rank``).
    """

    def __init__(  # noqa: PLR0913 - by keyword
        self,
        config: ModelConfig,
        index: int,
        *,
        name: str,
        q_rank: int | None,
        nope_dim: int,
        rope_dim: int,
        latent_dim: int,
        value_dim: int,
        scale: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        heads, tp, rank = config.num_attention_heads, config.mapping.tp_size, config.mapping.tp_rank
        self.spec = AttentionSpec(
            layer_idx=index,
            num_heads=heads // tp,
            num_kv_heads=1,
            head_dim=rope_dim + latent_dim,
            scale=scale,
            value_dim=latent_dim,
        )
        self.nope_dim, self.rope_dim = nope_dim, rope_dim
        query_dim, dtype = nope_dim + rope_dim, config.torch_dtype
        self.q_size = query_dim * self.spec.num_heads if q_rank is None else q_rank
        # A token's query, or its latent, then its key and value latent: "k" and "v", whose source has them swapped.
        query = split(heads * query_dim, tp, rank, what=f"the heads of {name}") if q_rank is None else whole(q_rank)
        parts = zip("qkv", (query, whole(rope_dim), whole(latent_dim)))
        sections = fused([replace(section, name=part) for part, section in parts])
        self.qkv_proj = Linear(whole(config.hidden_size), sections, bias, config=config, name=f"{name}.qkv_proj")
        self.latent_norm = RMSNorm(latent_dim, _LATENT_EPS, dtype)
        self.q_norm: RMSNorm | None = None
        self.q_up: ColumnParallelLinear | None = None
        if q_rank is not None:
            self.q_norm = RMSNorm(q_rank, _LATENT_EPS, dtype)
            self.q_up = ColumnParallelLinear(q_rank, heads * query_dim, False, config=config, name=f"{name}.q_up")
        rows = nope_dim + value_dim
        self.k_up = HeadwiseLinear(nope_dim, latent_dim, rows=rows, first=0, config=config, name=f"{name}.k_up")
        self.v_up = HeadwiseLinear(latent_dim, value_dim, rows=rows, first=nope_dim, config=config, name=f"{name}.v_up")
        self.o_proj = RowParallelLinear(
            heads * value_dim, config.hidden_size, bias, config=config, name=f"{name}.o_proj"
        )
        quantized = config.quantization.kv_cache_quant_algo is not None
        self.kv_scales: Parameter | None = empty_parameter(replicated(2), torch.float32) if quantized else None

    @property
    def input_scale(self) -> torch.Tensor | None:
        """Scale with which x may also come as float8, see `Linear.input_scale`."""
        return self.qkv_proj.input_scale

    def forward(
        self, x: torch.Tensor, rotation: Rotation | None, ctx: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns [T, hidden], or [R, hidden] of the tokens ``rows`` [R] alone."""
        qkv = self.qkv_proj(x, ctx)
        q, k, latent = qkv.split_with_sizes((self.q_size, self.rope_dim, self.spec.out_dim), dim=1)
        keys = torch.cat((k, self.latent_norm(latent)[0]), dim=1).unsqueeze(1)
        out = ctx.attend(
            self.spec, self._queries(q, ctx), keys, None, rotation=rotation, kv_scales=self.kv_scales
        )  # [T, H, L]
        if rows is not None:
            out = ops.take_rows(out, rows)
            if not out.shape[0]:
                return qkv.new_empty(0, self.o_proj.out_features_local)
        return self.o_proj(self.v_up(out, ctx).flatten(1), ctx)

    def _queries(self, q: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Returns what is multiplied by cached keys [T, H, R + L], from what the first projection gives for queries."""
        if self.q_up is not None and self.q_norm is not None:
            q = self.q_up(self.q_norm(q, None, self.q_up.input_scale)[0], ctx)
        heads = q.reshape(q.shape[0], self.spec.num_heads, self.nope_dim + self.rope_dim)
        plain, rotating = heads.split_with_sizes((self.nope_dim, self.rope_dim), dim=2)
        return torch.cat((rotating, self.k_up(plain, ctx)), dim=2)
