"""What DeepSeek-V2 and V3 share: fields, latent attention, dense layers first, and where checkpoints keep things."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.latent_attention import LatentAttention
from lamella_core.layers.mlp import FeedForward, GatedMLP
from lamella_core.layers.moe import MoE, Router, SharedExpert
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._moe import SparseConfig
from lamella_core.models._rules import (
    expert_rules,
    gated_mlp_rules,
    module_rules,
    norm_rules,
    shared_expert_rules,
    vocabulary_rules,
)
from lamella_core.models.base import CausalLM

_ATTENTION = "layers.{i}.attention"


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(SparseConfig):
    """``head_dim`` and ``num_key_value_heads`` are those of the cache: one key of rotated numbers and latent."""

    kv_lora_rank: int  # size of the latent of keys and values
    q_lora_rank: int | None = None  # of that of queries; None: queries have none
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_shared_experts: int | None = None  # that many times moe_intermediate_size wide; None: none
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    attention_bias: bool = False  # of the projections from and to the hidden state
    num_nextn_predict_layers: int | None = None  # layers after the last that guess further tokens: not read

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by; rope type "yarn" sharpens them for all dimensions (``mscale_all_dim``)."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        scaling = self.rope.scaling if self.rope is not None and self.rope.rope_type != "default" else {}
        factor, weight = scaling.get("factor") or 1.0, scaling.get("mscale_all_dim") or 0.0
        return scale if factor <= 1.0 else scale * (0.1 * weight * math.log(factor) + 1.0) ** 2

    @staticmethod
    def shared_fields(hf: HfConfig, *, interleaved: bool = True) -> dict[str, Any]:
        """Returns the fields of both models read from a Hugging Face config."""
        hf.require("moe_layer_freq", (1, None), default=1)
        rotating, latent = hf.integer("qk_rope_head_dim"), hf.integer("kv_lora_rank")
        layers, dense = hf.integer("num_hidden_layers"), hf.integer("first_k_dense_replace", default=0, least=0)
        shared = hf.integer("n_shared_experts", default=None, least=0, nullable=True)
        further = hf.integer("num_nextn_predict_layers", "num_mtp_layers", default=None, least=0, nullable=True)
        hf.get("head_dim", "num_key_value_heads", default=None)  # of no meaning beside a latent
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hf.integer("hidden_size"),
            "num_hidden_layers": layers,
            "num_attention_heads": hf.integer("num_attention_heads"),
            "num_key_value_heads": 1,
            "head_dim": rotating + latent,
            "intermediate_size": hf.integer("intermediate_size"),
            "max_position_embeddings": hf.integer("max_position_embeddings"),
            "hidden_act": hf.activation("hidden_act", default="silu"),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=False),
            **hf.token_ids(),
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "rope": hf.rope(rotating, interleaved=interleaved),
            "kv_lora_rank": latent,
            "q_lora_rank": hf.integer("q_lora_rank", default=1536, nullable=True),
            "qk_nope_head_dim": hf.integer("qk_nope_head_dim"),
            "qk_rope_head_dim": rotating,
            "v_head_dim": hf.integer("v_head_dim"),
            "num_experts": hf.integer("n_routed_experts", "num_local_experts", "num_experts"),
            "num_experts_per_tok": hf.integer("num_experts_per_tok"),
            "moe_intermediate_size": hf.integer("moe_intermediate_size"),
            "num_shared_experts": shared or None,
            "dense_layers": list(range(min(dense, layers))),
            "routed_scaling_factor": hf.number("routed_scaling_factor", default=1.0),
            "attention_bias": hf.flag("attention_bias", default=False),
            "num_nextn_predict_layers": further or None,
        }

    @staticmethod
    def group_fields(hf: HfConfig, default: int) -> dict[str, Any]:
        """Returns the fields that limit a token to some groups of experts; null means one group."""
        groups = hf.integer("n_group", default=None, nullable=True)
        chosen = hf.integer("topk_group", default=None, nullable=True)
        if (groups is None) != (chosen is None):
            raise ConfigError(f"{hf.where}: n_group is {groups!r} and topk_group {chosen!r}; give both or none")
        return {"n_group": groups or default, "topk_group": chosen or default}


def _attention_rules() -> list[WeightRule]:
    source = "model.layers.{i}.self_attn"
    first = [
        WeightRule(f"{source}.{name}.{leaf}", f"{_ATTENTION}.qkv_proj.{leaf}", section=section, optional=optional)
        for leaf in ("weight", "bias")
        for name, section, optional in (
            ("q_a_proj", "q", False),
            ("q_proj", "q", leaf == "bias"),  # has none, also where the others do
            ("kv_a_proj_with_mqa", ("v", "k"), False),
        )
    ]
    return [
        *first,
        WeightRule(f"{source}.q_a_layernorm.weight", f"{_ATTENTION}.q_norm.weight"),
        WeightRule(f"{source}.q_b_proj.weight", f"{_ATTENTION}.q_up.weight"),
        WeightRule(f"{source}.kv_a_layernorm.weight", f"{_ATTENTION}.latent_norm.weight"),
        WeightRule(f"{source}.kv_b_proj.weight", f"{_ATTENTION}.k_up.weight", transpose=True),
        WeightRule(f"{source}.kv_b_proj.weight", f"{_ATTENTION}.v_up.weight"),
        *module_rules({"o_proj": "o_proj"}, f"{source}.", f"{_ATTENTION}."),
    ]


class DeepseekModel(CausalLM):
    """Pre-norm decoder: RMSNorm, latent attention, gated MLPs in the first layers, then experts beside a shared one."""

    config: DeepseekConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *vocabulary_rules(),
        *norm_rules(),
        *_attention_rules(),
        *gated_mlp_rules(),
        *expert_rules(),
        *shared_expert_rules("mlp.shared_experts"),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=LatentAttention(
                config,
                index,
                name=f"{name}.attention",
                q_rank=config.q_lora_rank,
                nope_dim=config.qk_nope_head_dim,
                rope_dim=config.qk_rope_head_dim,
                latent_dim=config.kv_lora_rank,
                value_dim=config.v_head_dim,
                scale=config.attention_scale,
                bias=config.attention_bias,
            ),
            mlp_norm=self.make_norm(),
            mlp=self.make_mlp(index, f"{name}.mlp"),
        )

    def make_mlp(self, index: int, name: str) -> FeedForward:
        config = self.config
        if index in config.dense_layers:
            return GatedMLP(config, name=name)
        shared = None
        if config.num_shared_experts is not None:
            inner = config.num_shared_experts * config.moe_intermediate_size
            shared = SharedExpert(config, inner=inner, name=f"{name}.shared")
        return MoE(
            config,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            inner=config.moe_intermediate_size,
            router=self.make_router(f"{name}.router"),
            shared=shared,
            name=name,
        )

    def make_router(self, name: str) -> Router:
        """Returns what chooses the experts of a layer."""
        raise NotImplementedError

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)

    def weight_rules(self, source_names: Collection[str]) -> list[WeightRule]:
        unused = ".q_proj." if self.config.q_lora_rank is not None else ".q_a_proj."
        return [rule for rule in super().weight_rules(source_names) if unused not in rule.source]

    def ignored_sources(self) -> list[str]:
        first, count = self.config.num_hidden_layers, self.config.num_nextn_predict_layers or 0
        return [*self.IGNORED, *(f"*layers.{layer}.*" for layer in range(first, first + count))]
