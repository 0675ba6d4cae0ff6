"""BLOOM (Le Scao et al. 2022): ALiBi instead of positions, and a norm of the token embeddings.

Query, key and value of one head lie together in the checkpoint.
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
from lamella_core.layers.alibi import alibi_slopes
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.layers.rotary import Rotation
from lamella_core.models._rules import interleaved_qkv_rules, module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class BloomConfig(ModelConfig):
    """BLOOM's own field."""

    apply_residual_connection_post_layernorm: bool = False  # the stream goes on from what a norm returns

    hf_model_types: ClassVar[tuple[str, ...]] = ("bloom",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config.

        slow_but_exact and pretraining_tp choose an order of summation, which is this library's own here.
        """
        hidden, heads = hf.integer("n_embed", "hidden_size"), hf.integer("n_head", "num_attention_heads")
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("n_layer", "num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hf.head_dim(hidden, heads),
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": hf.integer("seq_length", default=2048),
            "norm_eps": hf.get("layer_norm_epsilon", default=1e-5),
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "apply_residual_connection_post_layernorm": hf.flag(
                "apply_residual_connection_post_layernorm", default=False
            ),
            **hf.token_ids(),
        }


class NormedStreamLayer(DecoderLayer):
    """A pre-norm layer whose stream goes on from the normed sum, not from the sum."""

    selects_rows = False

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream, _ = self.input_norm(hidden, residual)
        stream, _ = self.mlp_norm(self.attention(stream, rotation, ctx), stream)
        return self.mlp(stream, ctx), stream


def _rules() -> list[WeightRule]:
    vocabulary = {
        "transformer.word_embeddings": "embed_tokens",
        "transformer.word_embeddings_layernorm": "embedding_norm",
        "transformer.ln_f": "norm",
        "lm_head": "lm_head",
    }
    source, target = "transformer.h.{i}.", "layers.{i}."
    layer = {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attention.dense": "attention.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    return [
        *module_rules(vocabulary),
        *interleaved_qkv_rules(f"{source}self_attention.query_key_value"),
        *module_rules(layer, source, target),
    ]


@register("BloomForCausalLM")
class BloomForCausalLM(CausalLM):
    """Pre-norm decoder: LayerNorm, multi-head attention with ALiBi, plain MLP."""

    config: BloomConfig
    config_class = BloomConfig
    SOURCE_PREFIX = "transformer."
    WEIGHTS = tuple(_rules())

    def __init__(self, config: BloomConfig) -> None:
        super().__init__(config)
        self.embedding_norm = self.make_norm() if config.mapping.is_first_pp_rank else None

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        tokens = super().embed(input_ids, positions, ctx)
        return tokens if self.embedding_norm is None else self.embedding_norm(tokens)[0]

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        layer = NormedStreamLayer if config.apply_residual_connection_post_layernorm else DecoderLayer
        return layer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=True,
                out_bias=True,
                alibi_slopes=alibi_slopes(config.num_attention_heads),
            ),
            mlp_norm=self.make_norm(),
            mlp=MLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
