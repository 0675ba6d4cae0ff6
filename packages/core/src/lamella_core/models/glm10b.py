"""GLM (Du et al. 2022) as published with GLM-10B: a decoder that fills blanks, before the chat models.

A prompt is read in both directions (see `lamella_core.prefix`), and each token has two learned positions: its place (in
what is generated, that of the blank) and its place in the block that fills the blank. Otherwise like GPT-2. Not to be
confused with transformers' Glm, which is of 2024 (`lamella_core.models.glm`) and has the same model_type.
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
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.embedding import PositionEmbedding
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register
from lamella_core.prefix import PrefixRule

# <|startofpiece|>, <|endofpiece|>, and [MASK], [sMASK], [gMASK] of the published vocabularies, by their size: the
# config.json files of glm-10b and glm-10b-chinese do not name them.
_TOKENS: dict[int, dict[str, Any]] = {
    50304: {"sop_token_id": 50257, "eop_token_id": 50258, "mask_token_ids": (50260, 50263, 50264)},
    50048: {"sop_token_id": 50006, "eop_token_id": 50007, "mask_token_ids": (50003, 50008, 50009)},
}


@dataclass(frozen=True, kw_only=True)
class GLM10BConfig(ModelConfig):
    """GLM-10B's own fields."""

    start_token_id: int  # begins what is generated
    mask_token_ids: tuple[int, ...]  # what stands for a blank

    hf_model_types: ClassVar[tuple[str, ...]] = ("glm",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        hf.require("block_position_encoding", (True,), True)
        hf.require("relative_encoding", (False,), False)
        hf.require("spell_length", (None,), None)
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        vocabulary = hf.integer("vocab_size")
        tokens = _TOKENS.get(vocabulary, {})
        start, end, masks = (
            hf.get(name, **({"default": tokens[name]} if name in tokens else {}))
            for name in ("sop_token_id", "eop_token_id", "mask_token_ids")
        )
        ids = hf.token_ids()
        return {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("num_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hf.head_dim(hidden, heads),
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": hf.integer("max_sequence_length"),
            "norm_eps": hf.get("layernorm_epsilon", default=1e-5),
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
            "start_token_id": start,
            "mask_token_ids": masks,
            **ids,
            "eos_token_ids": ids["eos_token_ids"] or (end,),
        }

    @property
    def prefix_rule(self) -> PrefixRule:
        return PrefixRule(self.start_token_id, (self.mask_token_ids,))


def _rules() -> list[WeightRule]:
    source, target = "glm.transformer.layers.{i}.", "layers.{i}."
    layer = {
        "input_layernorm": "input_norm",
        "attention.dense": "attention.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    fused = [
        WeightRule(
            f"{source}attention.query_key_value.{leaf}", f"{target}attention.qkv_proj.{leaf}", section=("q", "k", "v")
        )
        for leaf in ("weight", "bias")
    ]
    return [
        WeightRule("glm.word_embeddings.weight", "embed_tokens.weight"),
        WeightRule("glm.transformer.position_embeddings.weight", "position_embedding.weight"),
        WeightRule("glm.transformer.block_position_embeddings.weight", "block_embedding.weight"),
        *module_rules({"glm.transformer.final_layernorm": "norm"}),
        *fused,
        *module_rules(layer, source, target),
    ]


@register("GLMModel", "GLMForConditionalGeneration")
class GLM10BModel(CausalLM):
    """Prefix decoder with LayerNorm before each half, learned positions in two dimensions, and a plain MLP."""

    config: GLM10BConfig
    config_class = GLM10BConfig
    SOURCE_PREFIX = "glm."
    WEIGHTS = tuple(_rules())

    def __init__(self, config: GLM10BConfig) -> None:
        super().__init__(config)
        self.position_embedding = self.block_embedding = None
        if config.mapping.is_first_pp_rank:  # one row more than there are positions: blocks count from 1
            rows = config.max_position_embeddings + 1
            self.position_embedding, self.block_embedding = (
                PositionEmbedding(rows, config.hidden_size, config.torch_dtype) for _ in range(2)
            )

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        tokens = super().embed(input_ids, positions, ctx)
        if self.position_embedding is None or self.block_embedding is None:
            return tokens
        places, in_block = ctx.prefixes.places(positions)
        return tokens + self.position_embedding(places) + self.block_embedding(in_block)

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=True, out_bias=True),
            mlp_norm=self.make_norm(),
            mlp=MLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
