"""ChatGLM-6B, the first version (Zeng et al. 2022, "GLM-130B"; Du et al. 2022, "GLM"), by the name of its successors.

A prompt is read in both directions (see `lamella_core.prefix`). Each token has two positions: half of each head rotates
by the one, half by the other. Norms are followed by a wide residual: a layer adds to sqrt(2 L) times what its norms
return, not to the stream. Rotary frequencies were rounded to float16.

Shape legend: T tokens, H hidden size, D head size, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.head_norm import HeadNorm
from lamella_core.layers.mlp import MLP
from lamella_core.layers.norm import LayerNorm
from lamella_core.layers.rotary import Rotation
from lamella_core.models._rules import interleaved_qkv_rules, module_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register
from lamella_core.prefix import PrefixRule
from lamella_core.rope_config import RopeConfig


@dataclass(frozen=True, kw_only=True)
class ChatGLM1Config(ModelConfig):
    """ChatGLM-6B's own fields."""

    start_token_id: int  # begins the answer
    gmask_token_id: int  # stands in the prompt for what is generated, at its end
    mask_token_id: int  # likewise, anywhere

    hf_model_types: ClassVar[tuple[str, ...]] = ("chatglm",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        hf.require("position_encoding_2d", (True,), True)
        hf.require("quantization_bit", (0, None), 0)
        hf.require("pre_seq_len", (None,), None)
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        head_dim = hf.head_dim(hidden, heads)
        if head_dim % 4:
            raise ConfigError(f"{hf.where}: hidden_size {hidden} over {heads} heads is {head_dim}, no multiple of 4")
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": hf.integer("num_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": head_dim,
            "intermediate_size": hf.integer("inner_hidden_size", default=4 * hidden),
            "max_position_embeddings": hf.integer("max_sequence_length"),
            "norm_eps": hf.get("layernorm_epsilon", default=1e-5),
            "hidden_act": "gelu_new",
            "rope": RopeConfig(rotary_dim=head_dim // 2, rope_type="float16"),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "start_token_id": hf.integer("bos_token_id"),
            "gmask_token_id": hf.integer("gmask_token_id"),
            "mask_token_id": hf.integer("mask_token_id"),
            **hf.token_ids(),
        }

    @property
    def prefix_rule(self) -> PrefixRule:
        return PrefixRule(self.start_token_id, ((self.gmask_token_id,), (self.mask_token_id,)))


class _Quarters(HeadNorm):
    """Reorders heads: of the quarters a b c d, where (a, b) and (c, d) rotate as pairs of halves, come a c b d.

    Then (a c) and (b d) are the halves of the whole head. Queries and keys are reordered alike, so scores stay.
    """

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        return x.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


class _WideResidualLayer(DecoderLayer):
    """Adds attention and MLP to ``residual_scale`` times what they read."""

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        normed = self.input_norm(hidden, residual)[0]
        attended = self.attention(normed, rotation, ctx, rows)
        if rows is not None:
            normed = normed.index_select(0, rows)
            if not normed.shape[0]:
                return attended, None
        normed = self.mlp_norm(normed * self.residual_scale + attended)[0]
        return normed * self.residual_scale + self.mlp(normed, ctx), None


def _rules() -> list[WeightRule]:
    source, target = "transformer.layers.{i}.", "layers.{i}."
    layer = {
        "input_layernorm": "input_norm",
        "attention.dense": "attention.o_proj",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    return [
        WeightRule("transformer.word_embeddings.weight", "embed_tokens.weight"),
        *module_rules({"transformer.final_layernorm": "norm", "lm_head": "lm_head"}),
        *interleaved_qkv_rules(f"{source}attention.query_key_value"),
        *module_rules(layer, source, target),
    ]


@register("ChatGLM1Model")
class ChatGLM1Model(CausalLM):
    """Prefix decoder with LayerNorm, wide residuals, positions in two dimensions and a plain MLP."""

    config: ChatGLM1Config
    config_class = ChatGLM1Config
    SOURCE_PREFIX = "transformer."
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = tuple(_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        attention = Attention(
            config,
            index,
            name=f"{name}.attention",
            qkv_bias=True,
            out_bias=True,
            q_norm=_Quarters(),
            k_norm=_Quarters(),
        )
        return _WideResidualLayer(
            input_norm=self.make_norm(),
            attention=attention,
            mlp_norm=self.make_norm(),
            mlp=MLP(config, name=f"{name}.mlp"),
            residual_scale=math.sqrt(2 * config.num_hidden_layers),
        )

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        ctx: ForwardContext,
        hidden: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns what `CausalLM.forward` does; both positions of a token come from the prefix of its sequence."""
        if hidden is None:
            hidden = self.embed(input_ids, positions, ctx)
        return self.run_layers(hidden, self._rotation(positions, ctx), ctx, rows)

    def _rotation(self, positions: torch.Tensor, ctx: ForwardContext) -> Rotation | None:
        """Returns rotations of whole heads, in the order that `_Quarters` gives them."""
        if self.rotary is None:
            return None
        first, second = (self.rotary(places) for places in ctx.prefixes.places(positions))
        cos, sin = torch.cat((first.cos, second.cos), -1), torch.cat((first.sin, second.sin), -1)
        return Rotation(cos, sin, self.config.head_dim, interleaved=False)
