"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019): encoders that classify a text or a pair of texts.

Every token sees all others; norms follow each addition; the head reads the first token.
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
from lamella_core.layers.decoder import NormAfterLayer
from lamella_core.layers.embedding import PositionEmbedding, VocabMatrix
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.layers.parameter import Parameter, empty_parameter
from lamella_core.layers.score_head import ScoreHead
from lamella_core.layers.sharding import replicated
from lamella_core.models._scoring import SINGLE_LABEL, scoring_fields
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """BERT's own fields. ``max_position_embeddings`` counts the tokens of a text, not the rows of the table."""

    labels: tuple[str, ...] = ()
    problem_type: str = SINGLE_LABEL
    type_vocab_size: int = 2  # parts that a text can have

    hf_model_types: ClassVar[tuple[str, ...]] = ("bert",)

    @property
    def first_position(self) -> int:
        """Row of the first token's position."""
        return 0

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        hf.require("position_embedding_type", ("absolute",), "absolute")
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hf.head_dim(hidden, heads),
            "intermediate_size": hf.integer("intermediate_size"),
            "max_position_embeddings": hf.integer("max_position_embeddings"),
            "hidden_act": hf.activation("hidden_act", default="gelu"),
            "norm_eps": hf.get("layer_norm_eps", default=1e-12),
            "type_vocab_size": hf.integer("type_vocab_size", default=2),
            **hf.token_ids(),
            **scoring_fields(hf),
        }


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """RoBERTa's positions begin after the row whose number is that of the padding token."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert")

    @property
    def first_position(self) -> int:
        return 2 if self.pad_token_id is None else self.pad_token_id + 1

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        pad = hf.integer("pad_token_id", default=1, least=0)
        rows = hf.integer("max_position_embeddings", least=pad + 2)
        return {**super().from_hf(hf), "pad_token_id": pad, "max_position_embeddings": rows - pad - 1}


def _rules(prefix: str, head: dict[str, str]) -> tuple[WeightRule, ...]:
    """The rules of a checkpoint whose encoder is called ``prefix`` and whose head's two layers are called ``head``."""
    embeddings, layer, target = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{i}}", "layers.{i}"
    leaves = ("weight", "bias")
    norms = {
        f"{embeddings}.LayerNorm": "embedding_norm",
        f"{layer}.attention.output.LayerNorm": f"{target}.input_norm",
        f"{layer}.output.LayerNorm": f"{target}.mlp_norm",
    }
    linears = {
        f"{layer}.attention.output.dense": f"{target}.attention.o_proj",
        f"{layer}.intermediate.dense": f"{target}.mlp.up_proj",
        f"{layer}.output.dense": f"{target}.mlp.down_proj",
        **head,
    }
    sections = {"query": "q", "key": "k", "value": "v"}
    return (
        WeightRule(f"{embeddings}.word_embeddings.weight", "embed_tokens.weight"),
        WeightRule(f"{embeddings}.position_embeddings.weight", "position_embedding.weight"),
        WeightRule(f"{embeddings}.token_type_embeddings.weight", "token_type_embedding"),
        *(WeightRule(f"{old}.{leaf}", f"{new}.{leaf}") for old, new in norms.items() for leaf in leaves),
        *(WeightRule(f"{old}.{leaf}", f"{new}.{to}") for old, new in norms.items() for leaf, to in _OLDER.items()),
        *(WeightRule(f"{old}.{leaf}", f"{new}.{leaf}") for old, new in linears.items() for leaf in leaves),
        *(
            WeightRule(f"{layer}.attention.self.{name}.{leaf}", f"{target}.attention.qkv_proj.{leaf}", section=section)
            for name, section in sections.items()
            for leaf in leaves
        ),
    )


_OLDER = {"gamma": "weight", "beta": "bias"}  # what norms called theirs in the first checkpoints


@register("BertForSequenceClassification")
class BertForSequenceClassification(CausalLM):
    """Encoder with learned positions and token types; pooler and classifier over the first token."""

    config: BertConfig
    config_class = BertConfig
    task = "score"
    pooling = "first"
    is_causal = False
    SOURCE_PREFIX = ""
    IGNORED = ("*.embeddings.position_ids", "cls.*")
    WEIGHTS = _rules("bert", {"bert.pooler.dense": "lm_head.dense", "classifier": "lm_head.out"})

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.position_embedding: PositionEmbedding | None = None
        self.token_type_embedding: Parameter | None = None
        self.embedding_norm: LayerNorm | None = None
        if config.mapping.is_first_pp_rank:
            hidden, dtype = config.hidden_size, config.torch_dtype
            first = config.first_position
            self.position_embedding = PositionEmbedding(config.max_position_embeddings, hidden, dtype, offset=first)
            self.token_type_embedding = empty_parameter(replicated(config.type_vocab_size, hidden), dtype)
            self.embedding_norm = self._norm()

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Returns [T, H]; the part of the text that a token is in is ``ctx.token_types`` [T] int64, 0 without."""
        tokens = super().embed(input_ids, positions, ctx)
        types = getattr(ctx, "token_types", None)
        table, places, norm = self.token_type_embedding, self.position_embedding, self.embedding_norm
        if table is None or places is None or norm is None:
            return tokens
        parts = table[0] if types is None else table.index_select(0, types)
        return norm(tokens + parts + places(positions))[0]

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return NormAfterLayer(
            input_norm=self._norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=True, out_bias=True),
            mlp_norm=self._norm(),
            mlp=MLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> None:
        return None

    def make_head(self, tied: VocabMatrix | None) -> nn.Module:
        return ScoreHead(self.config, len(self.config.labels), activation="tanh", bias=True)

    def _norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)


@register("RobertaForSequenceClassification", "XLMRobertaForSequenceClassification")
class RobertaForSequenceClassification(BertForSequenceClassification):
    """BERT with other positions and names."""

    config: RobertaConfig
    config_class = RobertaConfig
    IGNORED = ("*.embeddings.position_ids", "lm_head.*")
    WEIGHTS = _rules("roberta", {"classifier.dense": "lm_head.dense", "classifier.out_proj": "lm_head.out"})
