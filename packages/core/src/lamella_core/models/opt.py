"""OPT (Zhang et al. 2022): learned positions from row 2 of their table on, plain MLP with ReLU, tied embeddings.

The 350M model norms after attention and MLP instead of before them, and has embeddings that are narrower than the
layers, with a projection on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer, NormAfterLayer
from lamella_core.layers.embedding import PositionEmbedding
from lamella_core.layers.linear import ReplicatedLinear
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

_FIRST_POSITION = 2  # row of the position table


@dataclass(frozen=True, kw_only=True)
class OPTConfig(ModelConfig):
    """OPT's own fields."""

    do_layer_norm_before: bool = True
    final_norm: bool = True  # after the last layer
    enable_bias: bool = True  # of all projections
    layer_norm_elementwise_affine: bool = True  # norms have weights and biases

    hf_model_types: ClassVar[tuple[str, ...]] = ("opt",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        width = hf.integer("word_embed_proj_dim", default=None, nullable=True)
        norm_before = hf.flag("do_layer_norm_before", default=True)
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hf.head_dim(hidden, heads),
            "intermediate_size": hf.integer("ffn_dim"),
            "max_position_embeddings": hf.integer("max_position_embeddings"),
            "hidden_act": hf.activation("activation_function", default="relu"),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "embedding_size": None if width == hidden else width,
            "do_layer_norm_before": norm_before,
            "final_norm": norm_before and not hf.flag("_remove_final_layer_norm", default=False),
            "enable_bias": hf.flag("enable_bias", default=True),
            "layer_norm_elementwise_affine": hf.flag("layer_norm_elementwise_affine", default=True),
            **hf.token_ids(),
        }


def _rules() -> list[WeightRule]:
    source, target = "model.decoder.layers.{i}.", "layers.{i}."
    vocabulary = {
        "model.decoder.embed_tokens": "embed_tokens",
        "model.decoder.embed_positions": "position_embedding",
        "model.decoder.project_in": "project_in",
        "model.decoder.project_out": "project_out",
        "model.decoder.final_layer_norm": "norm",
        "lm_head": "lm_head",
    }
    layer = {
        "self_attn_layer_norm": "input_norm",
        "self_attn.out_proj": "attention.o_proj",
        "final_layer_norm": "mlp_norm",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
    }
    projections = [
        WeightRule(f"{source}self_attn.{s}_proj.{leaf}", f"{target}attention.qkv_proj.{leaf}", section=s)
        for s in "qkv"
        for leaf in ("weight", "bias")
    ]
    return [*module_rules(vocabulary), *projections, *module_rules(layer, source, target)]


@register("OPTForCausalLM")
class OPTForCausalLM(CausalLM):
    """Decoder with LayerNorm before or after, multi-head attention without rotary positions, plain MLP."""

    config: OPTConfig
    config_class = OPTConfig
    WEIGHTS = tuple(_rules())

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config)
        hidden, width, mapping = config.hidden_size, config.embedding_size, config.mapping
        self.position_embedding: PositionEmbedding | None = None
        self.project_in: ReplicatedLinear | None = None
        self.project_out: ReplicatedLinear | None = None
        if mapping.is_first_pp_rank:
            self.position_embedding = PositionEmbedding(
                config.max_position_embeddings, hidden, config.torch_dtype, offset=_FIRST_POSITION
            )
        if width is not None and mapping.is_first_pp_rank:
            self.project_in = ReplicatedLinear(width, hidden, False, config=config, name="project_in")
        if width is not None and mapping.is_last_pp_rank:
            self.project_out = ReplicatedLinear(hidden, width, False, config=config, name="project_out")

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        tokens = super().embed(input_ids, positions, ctx)
        if self.project_in is not None:
            tokens = self.project_in(tokens, ctx)
        return tokens if self.position_embedding is None else tokens + self.position_embedding(positions)

    def compute_logits(
        self, hidden: torch.Tensor, ctx: ForwardContext, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        return super().compute_logits(hidden if self.project_out is None else self.project_out(hidden, ctx), ctx, dtype)

    def make_layer(self, index: int) -> nn.Module:
        config, name, bias = self.config, f"layers.{index}", self.config.enable_bias
        layer = DecoderLayer if config.do_layer_norm_before else NormAfterLayer
        return layer(
            input_norm=self._norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=bias, out_bias=bias),
            mlp_norm=self._norm(),
            mlp=MLP(config, name=f"{name}.mlp", bias=bias),
        )

    def make_norm(self) -> LayerNorm | None:
        return self._norm() if self.config.final_norm else None

    def _norm(self) -> LayerNorm:
        config = self.config
        affine = config.layer_norm_elementwise_affine
        return LayerNorm(config.hidden_size, config.norm_eps, config.torch_dtype, affine=affine)
