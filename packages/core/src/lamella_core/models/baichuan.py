"""Baichuan 1 and 2 (Yang et al. 2023): Llama's shape, rotary at 7B and ALiBi at 13B; 2 has output rows of length 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.alibi import alibi_slopes
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.embedding import LMHead
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import gated_mlp_rules, module_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

_VOCABULARY_OF_2 = 125_696
_ROWS = 4096  # output rows scaled at a time


@dataclass(frozen=True, kw_only=True)
class BaichuanConfig(ModelConfig):
    """Baichuan's own fields; without ``rope`` the attention has ALiBi."""

    normalized_head: bool = False  # whether the rows of the output layer are scaled to length 1

    hf_model_types: ClassVar[tuple[str, ...]] = ("baichuan",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config.

        Published files name neither the kind of positions nor the version: those of models with ALiBi lack
        max_position_embeddings, those of version 2 have its vocabulary or a z_loss_weight.
        """
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        has_rope = hf.get("max_position_embeddings", default=None) is not None
        vocab_size, head_dim = hf.integer("vocab_size"), hf.head_dim(hidden, heads)
        is_second = vocab_size == _VOCABULARY_OF_2 or hf.get("z_loss_weight", default=None) is not None
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": head_dim,
            "intermediate_size": hf.integer("intermediate_size"),
            "max_position_embeddings": hf.integer("max_position_embeddings" if has_rope else "model_max_length"),
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "hidden_act": hf.activation("hidden_act", default="silu"),
            "tie_word_embeddings": hf.require("tie_word_embeddings", (False,), False),
            "rope": hf.rope(head_dim) if has_rope else None,
            "normalized_head": hf.flag("normalized_head", default=is_second),
            **hf.token_ids(),
        }


def _attention_rules() -> list[WeightRule]:
    source, target = "model.layers.{i}.self_attn.", "layers.{i}.attention."
    return [
        WeightRule(f"{source}W_pack.weight", f"{target}qkv_proj.weight", ("q", "k", "v")),
        *module_rules({"o_proj": "o_proj"}, source, target),
    ]


@register("BaichuanForCausalLM", "BaiChuanForCausalLM")
class BaichuanForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, multi-head attention, gated MLP."""

    config: BaichuanConfig
    config_class = BaichuanConfig
    IGNORED = ("*.rotary_emb.inv_freq", "*.future_mask")
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *_attention_rules(), *gated_mlp_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                alibi_slopes=alibi_slopes(config.num_attention_heads) if config.rope is None else None,
            ),
            mlp_norm=self.make_norm(),
            mlp=GatedMLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)

    def finish_loading(self) -> None:
        if isinstance(self.lm_head, LMHead) and self.config.normalized_head:
            with torch.no_grad():
                for rows in self.lm_head.weight.split(_ROWS):
                    rows.copy_(F.normalize(rows.float(), dim=1))
