"""GPT-NeoX (Black et al. 2022) and Pythia: attention and MLP side by side under norms of their own.

Query, key and value of one head lie together in the checkpoint. Part of each head rotates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer, ParallelDecoderLayer
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import interleaved_qkv_rules, module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    """GPT-NeoX's own fields."""

    use_parallel_residual: bool = True  # otherwise the MLP follows the attention
    attention_bias: bool = True

    hf_model_types: ClassVar[tuple[str, ...]] = ("gpt_neox",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config; rotary_pct and rotary_emb_base are the older names."""
        common = hf.decoder_fields()
        theta, partial = hf.get("rotary_emb_base", default=10000.0), hf.get("rotary_pct", default=0.25)
        return {
            **common,
            "hidden_act": hf.activation("hidden_act", default="gelu"),
            "norm_eps": hf.get("layer_norm_eps", default=1e-5),
            "rope": hf.rope(common["head_dim"], theta, default_partial=partial),
            "use_parallel_residual": hf.flag("use_parallel_residual", default=True),
            "attention_bias": hf.flag("attention_bias", default=True),
        }


def _rules() -> list[WeightRule]:
    vocabulary = {
        "gpt_neox.embed_in": "embed_tokens",
        "gpt_neox.final_layer_norm": "norm",
        "embed_out": "lm_head",
        "lm_head": "lm_head",
    }
    source, target = "gpt_neox.layers.{i}.", "layers.{i}."
    layer = {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "mlp_norm",
        "attention.dense": "attention.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    return [
        *module_rules(vocabulary),
        *interleaved_qkv_rules(f"{source}attention.query_key_value"),
        *module_rules(layer, source, target),
    ]


@register("GPTNeoXForCausalLM")
class GPTNeoXForCausalLM(CausalLM):
    """Parallel decoder: two LayerNorms, multi-head attention with partly rotating heads, plain MLP."""

    config: GPTNeoXConfig
    config_class = GPTNeoXConfig
    SOURCE_PREFIX = "gpt_neox."
    IGNORED = ("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias")
    WEIGHTS = tuple(_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        block = ParallelDecoderLayer if config.use_parallel_residual else DecoderLayer
        bias = config.attention_bias
        return block(
            input_norm=self.make_norm(),
            attention=Attention(config, index, name=f"{name}.attention", qkv_bias=bias, out_bias=bias),
            mlp_norm=self.make_norm(),
            mlp=MLP(config, name=f"{name}.mlp"),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
