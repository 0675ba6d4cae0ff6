"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, weights stored as [in, out], tied embeddings."""

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
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.embedding import PositionEmbedding
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


def gpt2_fields(hf: HfConfig) -> dict[str, Any]:
    """Returns the `ModelConfig` fields whose keys are GPT-2's in several models."""
    hidden, heads = hf.integer("n_embd", "hidden_size"), hf.integer("n_head", "num_attention_heads")
    inner = hf.integer("n_inner", "intermediate_size", default=None, nullable=True)
    return {
        "vocab_size": hf.integer("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": hf.integer("n_layer", "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hf.head_dim(hidden, heads),
        "intermediate_size": 4 * hidden if inner is None else inner,
        "max_position_embeddings": hf.integer("n_positions", "max_position_embeddings"),
        "norm_eps": hf.get("layer_norm_epsilon", default=1e-5),
        "hidden_act": hf.activation("activation_function", "hidden_act", default="gelu_new"),
        **hf.token_ids(),
    }


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2's own fields."""

    scale_attn_weights: bool = True  # by head_dim ** -0.5
    scale_attn_by_inverse_layer_idx: bool = False  # and by 1 / (layer + 1)

    hf_model_types: ClassVar[tuple[str, ...]] = ("gpt2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config.

        reorder_and_upcast_attn needs nothing here: scores are always computed in float32.
        """
        hf.require("add_cross_attention", (False, None), False)
        hf.get("reorder_and_upcast_attn", default=False)
        return {
            **gpt2_fields(hf),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "scale_attn_weights": hf.flag("scale_attn_weights", default=True),
            "scale_attn_by_inverse_layer_idx": hf.flag("scale_attn_by_inverse_layer_idx", default=False),
        }


def _rules() -> list[WeightRule]:
    source, target = "transformer.h.{i}", "layers.{i}"
    linears = {
        "attn.c_attn": "attention.qkv_proj",
        "attn.c_proj": "attention.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    both = ("weight", "bias")
    norms = {"ln_1": "input_norm", "ln_2": "mlp_norm"}
    return [
        WeightRule("transformer.wte.weight", "embed_tokens.weight"),
        WeightRule("transformer.wpe.weight", "position_embedding.weight"),
        *(WeightRule(f"{source}.{a}.weight", f"{target}.{b}.weight", transpose=True) for a, b in linears.items()),
        *(WeightRule(f"{source}.{a}.bias", f"{target}.{b}.bias") for a, b in linears.items()),
        *(WeightRule(f"{source}.{a}.{leaf}", f"{target}.{b}.{leaf}") for a, b in norms.items() for leaf in both),
        *(WeightRule(f"transformer.ln_f.{leaf}", f"norm.{leaf}") for leaf in both),
        WeightRule("lm_head.weight", "lm_head.weight"),
    ]  # fmt: skip


@register("GPT2LMHeadModel")
class GPT2LMHeadModel(CausalLM):
    """Pre-norm decoder: LayerNorm, multi-head attention without rotary positions, plain MLP."""

    config: GPT2Config
    config_class = GPT2Config
    SOURCE_PREFIX = "transformer."
    IGNORED = ("*.attn.bias", "*.attn.masked_bias")  # causal masks that old checkpoints carry
    WEIGHTS = tuple(_rules())

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.position_embedding = (
            PositionEmbedding(config.max_position_embeddings, config.hidden_size, config.torch_dtype)
            if config.mapping.is_first_pp_rank
            else None
        )

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        tokens = super().embed(input_ids, positions, ctx)
        return tokens if self.position_embedding is None else tokens + self.position_embedding(positions)

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=True, out_bias=True, scale=scale),
            mlp_norm=self.make_norm(),
            mlp=MLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
