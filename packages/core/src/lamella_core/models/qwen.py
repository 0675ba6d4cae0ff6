"""Qwen-1 (Bai et al. 2023): Llama's shape with biased queries, keys and values, stretched beyond its trained length.

There the rotary base grows in steps and queries are multiplied by a logarithm of their position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register
from lamella_core.rope_config import RopeConfig


@dataclass(frozen=True, kw_only=True)
class QWenConfig(ModelConfig):
    """Qwen-1's own fields; ``intermediate_size`` is that of the MLP, half of what config.json calls so."""

    bias: bool = False  # of all projections but those of queries, keys and values, which always have one

    hf_model_types: ClassVar[tuple[str, ...]] = ("qwen",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config, whose names are Qwen-1's own."""
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        head_dim, both = hf.integer("kv_channels", default=128), hf.integer("intermediate_size")
        if both % 2:
            raise ConfigError(f"{hf.where}: intermediate_size {both} is that of gate and up together; it must be even")
        hf.require("scale_attn_weights", (True,), True)
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": head_dim,
            "intermediate_size": both // 2,
            "max_position_embeddings": hf.integer("max_position_embeddings", "seq_length", default=8192),
            "norm_eps": hf.get("layer_norm_epsilon", default=1e-6),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=False),
            "rope": _rope(hf, head_dim),
            "bias": not hf.flag("no_bias", default=True),
            **hf.token_ids(),
        }


def _rope(hf: HfConfig, head_dim: int) -> RopeConfig:
    trained = hf.integer("seq_length", default=2048)
    grows = hf.flag("use_dynamic_ntk", default=True)
    return RopeConfig(
        rotary_dim=int(head_dim * hf.number("rotary_pct", default=1.0)),
        theta=hf.number("rotary_emb_base", default=10000.0),
        rope_type="qwen_dynamic" if grows else "default",
        scaling={"original_max_position_embeddings": trained} if grows else {},
        logn_length=trained if hf.flag("use_logn_attn", default=True) else None,
    )


def _rules() -> list[WeightRule]:
    source, target, gate_up = "transformer.h.{i}.", "layers.{i}.", "layers.{i}.mlp.gate_up_proj"
    names = {
        "ln_1": "input_norm",
        "attn.c_attn": "attention.qkv_proj",
        "attn.c_proj": "attention.o_proj",
        "ln_2": "mlp_norm",
        "mlp.c_proj": "mlp.down_proj",
    }
    return [
        WeightRule("transformer.wte.weight", "embed_tokens.weight"),
        *module_rules(names, source, target),
        *(WeightRule(f"{source}mlp.w2.{leaf}", f"{gate_up}.{leaf}", "gate") for leaf in ("weight", "bias")),
        *(WeightRule(f"{source}mlp.w1.{leaf}", f"{gate_up}.{leaf}", "up") for leaf in ("weight", "bias")),
        WeightRule("transformer.ln_f.weight", "norm.weight"),
        WeightRule("lm_head.weight", "lm_head.weight"),
    ]


@register("QWenLMHeadModel")
class QWenLMHeadModel(CausalLM):
    """Pre-norm decoder: RMSNorm, multi-head attention with rotary positions, gated MLP."""

    config: QWenConfig
    config_class = QWenConfig
    SOURCE_PREFIX = "transformer."
    IGNORED = ("*.rotary_emb.inv_freq", "*.attn.masked_bias")
    WEIGHTS = tuple(_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=True, out_bias=config.bias),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp", bias=config.bias),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
