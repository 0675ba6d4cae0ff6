"""Falcon (Almazrouei et al. 2023): 7B, 40B, 180B, 11B and the RW models, also under their first names (RefinedWeb).

| model | keys and values | norms of attention and MLP | positions |
|---|---|---|---|
| 7B | one head | one, side by side | rotary |
| 40B, 180B (``new_decoder_architecture``) | grouped | two, side by side | rotary |
| 11B | grouped | one, side by side | rotary |
| RW 1B, 7B | a head each | two, one after the other | ALiBi |

Checkpoints hold the queries of a key/value head, its key and its value together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.alibi import alibi_slopes
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer, ParallelDecoderLayer
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import interleaved_qkv_rules, module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class FalconConfig(ModelConfig):
    """Falcon's own fields."""

    alibi: bool = False  # instead of rotary positions
    bias: bool = False  # in all projections
    parallel_attn: bool = True  # attention and MLP side by side
    num_ln_in_parallel_attn: int = 1  # norms of a layer where they are

    hf_model_types: ClassVar[tuple[str, ...]] = ("falcon", "RefinedWeb", "RefinedWebModel")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_ln_in_parallel_attn > 2:
            raise ConfigError(f"num_ln_in_parallel_attn is {self.num_ln_in_parallel_attn}; a Falcon layer has 1 or 2")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; the model type RefinedWeb (40B) says it alone."""
        hidden, heads = hf.integer("n_embed", "hidden_size"), hf.integer("n_head", "num_attention_heads")
        inner = hf.integer("ffn_hidden_size", default=None, nullable=True)
        head_dim, alibi = hf.head_dim(hidden, heads), hf.flag("alibi", default=False)
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("n_layer", "num_hidden_layers"),
            "num_attention_heads": heads,
            "head_dim": head_dim,
            "intermediate_size": 4 * hidden if inner is None else inner,
            "max_position_embeddings": hf.integer("max_position_embeddings", default=2048),
            "norm_eps": hf.get("layer_norm_epsilon", default=1e-5),
            "hidden_act": hf.activation("activation", default="gelu"),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "rope": None if alibi else hf.rope(head_dim),
            "alibi": alibi,
            "bias": hf.flag("bias", default=False),
            **_layer_fields(hf, heads),
            **hf.token_ids(),
        }


def _layer_fields(hf: HfConfig, heads: int) -> dict[str, Any]:
    """Returns the fields that make up the kinds of layers."""
    is_new = hf.flag("new_decoder_architecture", default=hf.model_type == "RefinedWeb")
    grouped = hf.integer("n_head_kv", "num_kv_heads", default=None, nullable=True)
    multi_query, parallel = hf.flag("multi_query", default=True), hf.flag("parallel_attn", default=True)
    norms = hf.integer("num_ln_in_parallel_attn", default=None, nullable=True)
    if is_new and not parallel:
        raise ConfigError(f"{hf.where}: new_decoder_architecture needs parallel_attn; correct one of them")
    if not is_new and norms == 2:
        raise ConfigError(f"{hf.where}: num_ln_in_parallel_attn 2 needs new_decoder_architecture; correct one of them")
    return {
        "num_key_value_heads": (grouped or heads) if is_new else 1 if multi_query else heads,
        "parallel_attn": parallel,
        "num_ln_in_parallel_attn": (norms or 2) if is_new else 1,
    }


def _rules() -> list[WeightRule]:
    source, target = "transformer.h.{i}.", "layers.{i}."
    layer = {
        "input_layernorm": "input_norm",
        "ln_attn": "input_norm",
        "post_attention_layernorm": "mlp_norm",
        "ln_mlp": "mlp_norm",
        "self_attention.dense": "attention.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    return [
        *module_rules(
            {"transformer.word_embeddings": "embed_tokens", "transformer.ln_f": "norm", "lm_head": "lm_head"}
        ),
        *interleaved_qkv_rules(f"{source}self_attention.query_key_value"),
        *module_rules(layer, source, target),
    ]


@register("FalconForCausalLM", "RWForCausalLM")
class FalconForCausalLM(CausalLM):
    """Decoder with LayerNorm, attention beside or before a plain MLP, rotary positions or ALiBi."""

    config: FalconConfig
    config_class = FalconConfig
    SOURCE_PREFIX = "transformer."
    IGNORED = ("*.rotary_emb.inv_freq", "*.maybe_rotary.inv_freq")
    WEIGHTS = tuple(_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        # transformers' sdpa, its default, computes ALiBi in bfloat16 and scales it with the products; its eager
        # attention adds it a second time, with the mask.
        slopes = alibi_slopes(config.num_attention_heads).bfloat16().float() if config.alibi else None
        attention = Attention(
            config,
            index,
            name=f"{name}.attention",
            qkv_bias=config.bias,
            out_bias=config.bias,
            alibi_slopes=slopes,
            rounds_alibi=config.alibi,
        )
        mlp = MLP(config, name=f"{name}.mlp", bias=config.bias)
        if not config.parallel_attn:
            return DecoderLayer(input_norm=self.make_norm(), attention=attention, mlp_norm=self.make_norm(), mlp=mlp)
        mlp_norm = self.make_norm() if config.num_ln_in_parallel_attn == 2 else None
        return ParallelDecoderLayer(input_norm=self.make_norm(), attention=attention, mlp_norm=mlp_norm, mlp=mlp)

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
