"""StarCoder2 (Lozhkov et al. 2024): Llama's shape with LayerNorm, biases, a plain MLP and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.models._rules import attention_rules, module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class Starcoder2Config(ModelConfig):
    """StarCoder2's own field."""

    use_bias: bool = True  # in all projections

    hf_model_types: ClassVar[tuple[str, ...]] = ("starcoder2",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        common = hf.decoder_fields()
        return {
            **common,
            "hidden_act": hf.activation("hidden_act", default="gelu_pytorch_tanh"),
            "norm_eps": hf.get("norm_epsilon", default=1e-5),
            "rope": hf.rope(common["head_dim"]),
            "sliding_window": hf.integer("sliding_window", default=None, nullable=True),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "use_bias": hf.flag("use_bias", default=True),
        }


@register("Starcoder2ForCausalLM")
class Starcoder2ForCausalLM(CausalLM):
    """Pre-norm decoder: LayerNorm, windowed grouped-query attention with rotary positions, plain MLP."""

    config: Starcoder2Config
    config_class = Starcoder2Config
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (
        *module_rules({"model.embed_tokens": "embed_tokens", "model.norm": "norm", "lm_head": "lm_head"}),
        *attention_rules(),
        *module_rules(
            {
                "input_layernorm": "input_norm",
                "post_attention_layernorm": "mlp_norm",
                "mlp.c_fc": "mlp.up_proj",
                "mlp.c_proj": "mlp.down_proj",
            },
            source="model.layers.{i}.",
            target="layers.{i}.",
        ),
    )

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=config.use_bias,
                out_bias=config.use_bias,
                sliding_window=config.sliding_window,
            ),
            mlp_norm=self.make_norm(),
            mlp=MLP(config, name=f"{name}.mlp", bias=config.use_bias),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
