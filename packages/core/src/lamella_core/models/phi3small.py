"""Phi-3-small (Abdin et al. 2024): attention that is sparse in blocks, a clipped gate, and multipliers of muP.

Every ``dense_attention_every_n_layers``-th layer sees everything, the others the nearest blocks and columns of further
ones (`BlockSparsity`). The multipliers (Yang et al. 2022) scale embeddings, scores (1 / D instead of 1 / sqrt(D)) and
logits. Tokens that the padded vocabulary has too many are never likely.

Shape legend: T tokens, H hidden size, I inner size, D head size, R rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.kernels.sparsity import BlockSparsity
from lamella_core.layers.activation import quick_gelu
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.linear import ColumnParallelLinear, RowParallelLinear
from lamella_core.layers.mlp import FeedForward
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import interleaved_qkv_rules, module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

# Of the published vocabulary: unused and padding ids, and those of cl100k_base that the model was not trained on.
_VOCABULARY = 100352
_DUMMIES = (100256, *range(100258, 100261), 100264, 100265, *range(100267, _VOCABULARY))


@dataclass(frozen=True, kw_only=True)
class Phi3SmallConfig(ModelConfig):
    """Phi-3-small's own fields."""

    gegelu_limit: float  # what gates and up projections are clipped to
    attention_scale: float
    block_size: int  # tokens; of sparse attention
    num_local_blocks: int
    vert_stride: int  # blocks
    same_for_all_heads: bool
    dense_every: int | None  # each so many-th layer is dense; None: none is
    dummy_token_ids: tuple[int, ...] = ()  # whose logits are -inf

    hf_model_types: ClassVar[tuple[str, ...]] = ("phi3small",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        hf.require("hidden_act", ("gegelu",), "gegelu")
        hf.require("rope_position_scale", (1.0,), 1.0)
        hf.require("mup_use_scaling", (True,), True)
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        head_dim, vocabulary = hf.head_dim(hidden, heads), hf.integer("vocab_size")
        return {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": hf.integer("num_key_value_heads", default=8),
            "head_dim": head_dim,
            "intermediate_size": _inner_size(hf, hidden),
            "max_position_embeddings": hf.integer("max_position_embeddings", default=8192),
            "norm_eps": hf.get("layer_norm_epsilon", default=1e-5),
            "hidden_act": "quick_gelu",
            "rope": hf.rope(head_dim, hf.number("rope_embedding_base", default=1e6)),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "embedding_scale": hf.number("mup_embedding_multiplier", default=10.0),
            "logit_scale": 1.0 / hf.number("mup_width_multiplier", default=8.0),
            "attention_scale": hf.number("mup_attn_multiplier", default=1.0) / head_dim,
            "gegelu_limit": hf.number("gegelu_limit", default=20.0),
            "block_size": hf.integer("blocksparse_block_size", default=64),
            "num_local_blocks": hf.integer("blocksparse_num_local_blocks", default=16),
            "vert_stride": hf.integer("blocksparse_vert_stride", default=8),
            "same_for_all_heads": hf.flag("blocksparse_homo_head_pattern", default=False),
            "dense_every": hf.integer("dense_attention_every_n_layers", default=2, nullable=True),
            "dummy_token_ids": hf.get("dummy_token_indices", default=_DUMMIES if vocabulary == _VOCABULARY else ()),
            **hf.token_ids(),
        }

    def sparsity(self, index: int) -> BlockSparsity | None:
        """Returns the pattern of a layer; None: it is dense."""
        if self.dense_every is not None and (index + 1) % self.dense_every == 0:
            return None
        step = 0 if self.same_for_all_heads else max(1, self.vert_stride // self.num_attention_heads)
        return BlockSparsity(self.block_size, self.num_local_blocks, self.vert_stride, step)


def _inner_size(hf: HfConfig, hidden: int) -> int:
    """Returns I: as given, or a multiple of a third of H, in whole 256s if asked for."""
    multiplier = hf.integer("ff_dim_multiplier", default=None, nullable=True)
    given = hf.integer("ff_intermediate_size", default=None if multiplier else 14336, nullable=True)
    if (multiplier is None) == (given is None):
        raise ConfigError(f"{hf.where}: give either ff_dim_multiplier or ff_intermediate_size")
    if given is not None:
        return given
    size = multiplier * (hidden // 3) * 2
    return -(-size // 256) * 256 if hf.flag("gegelu_pad_to_256", default=True) else size


class _ClippedGatedMLP(FeedForward):
    """down(quick_gelu(gate(x)) * (up(x) + 1)), gate and up clipped; they lie in turns: gate 0, up 0, gate 1, up 1."""

    def __init__(self, config: Phi3SmallConfig, *, name: str) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.limit = config.gegelu_limit
        self.up_proj = ColumnParallelLinear(config.hidden_size, 2 * inner, True, config=config, name=f"{name}.up_proj")
        self.down_proj = RowParallelLinear(inner, config.hidden_size, True, config=config, name=f"{name}.down_proj")

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        gate, up = self.up_proj(x, ctx).unflatten(-1, (-1, 2)).unbind(-1)
        gated = quick_gelu(gate.clamp(max=self.limit)) * (up.clamp(-self.limit, self.limit) + 1)
        return self.down_proj(gated, ctx)


def _rules() -> list[WeightRule]:
    source, target = "model.layers.{i}.", "layers.{i}."
    layer = {
        "input_layernorm": "input_norm",
        "self_attn.dense": "attention.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    return [
        *module_rules({"model.embed_tokens": "embed_tokens", "model.final_layernorm": "norm", "lm_head": "lm_head"}),
        *interleaved_qkv_rules(f"{source}self_attn.query_key_value"),
        *module_rules(layer, source, target),
    ]


@register("Phi3SmallForCausalLM")
class Phi3SmallForCausalLM(CausalLM):
    """Pre-norm decoder: LayerNorm, grouped attention that is sparse in some layers, clipped gated MLP."""

    config: Phi3SmallConfig
    config_class = Phi3SmallConfig
    IGNORED = ("*.rotary_emb.*", "*._blocksparse_layer.*")
    WEIGHTS = tuple(_rules())
    dummy_tokens: torch.Tensor

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__(config)
        self.register_buffer("dummy_tokens", torch.tensor(config.dummy_token_ids, dtype=torch.int64), persistent=False)

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        attention = Attention(
            config,
            index,
            name=f"{name}.attention",
            qkv_bias=True,
            out_bias=True,
            scale=config.attention_scale,
            sparsity=config.sparsity(index),
        )
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=attention,
            mlp_norm=self.make_norm(),
            mlp=_ClippedGatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)

    def compute_logits(
        self, hidden: torch.Tensor, ctx: ForwardContext, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        logits = super().compute_logits(hidden, ctx, dtype)
        if self.dummy_tokens.numel():
            logits.index_fill_(1, self.dummy_tokens, float("-inf"))
        return logits
