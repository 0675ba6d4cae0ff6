"""GPT-J (Wang and Komatsuzaki 2021): attention and MLP read the same norm; interleaved rotation of part of the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import ParallelDecoderLayer
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.gpt2 import gpt2_fields
from lamella_core.models.registry import register
from lamella_core.rope_config import RopeConfig


@dataclass(frozen=True, kw_only=True)
class GPTJConfig(ModelConfig):
    """No fields of its own; the output layer has a bias."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("gptj",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config, whose names are GPT-2's."""
        return {
            **gpt2_fields(hf),
            "rope": RopeConfig(rotary_dim=hf.integer("rotary_dim", default=64), interleaved=True),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=False),
            "lm_head_bias": True,
        }


def _rules() -> list[WeightRule]:
    source, target = "transformer.h.{i}.", "layers.{i}."
    projections = [
        WeightRule(f"{source}attn.{s}_proj.weight", f"{target}attention.qkv_proj.weight", section=s) for s in "qkv"
    ]
    layer = {
        "ln_1": "input_norm",
        "attn.out_proj": "attention.o_proj",
        "mlp.fc_in": "mlp.up_proj",
        "mlp.fc_out": "mlp.down_proj",
    }
    return [
        *module_rules({"transformer.wte": "embed_tokens", "transformer.ln_f": "norm", "lm_head": "lm_head"}),
        *projections,
        *module_rules(layer, source, target),
    ]


@register("GPTJForCausalLM")
class GPTJForCausalLM(CausalLM):
    """Parallel decoder: LayerNorm, multi-head attention with partly rotating heads, plain MLP."""

    config: GPTJConfig
    config_class = GPTJConfig
    SOURCE_PREFIX = "transformer."
    IGNORED = ("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions")  # what old checkpoints carry
    WEIGHTS = tuple(_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return ParallelDecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention"),
            mlp=MLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
