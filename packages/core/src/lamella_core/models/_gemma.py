"""What Gemma's generations have in common: defaults of their config.json, scaled embeddings, norms by 1 + weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lamella_core.config import FULL, SLIDING, ModelConfig
from lamella_core.hf_config import HfConfig
from lamella_core.layers.norm import UnitOffsetRMSNorm
from lamella_core.models.base import CausalLM

_TANH_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class GemmaBaseConfig(ModelConfig):
    """Fields of every generation."""

    attention_bias: bool = False  # of the query, key, value and output projections

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config, whose defaults are Gemma's; ``rope`` is not among them.

        Embeddings are multiplied by the root of the hidden size.
        """
        common = hf.decoder_fields()
        hf.require("use_bidirectional_attention", (False, None), False)
        return {
            **common,
            "head_dim": hf.integer("head_dim", default=256),
            "hidden_act": _activation(hf),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=True),
            "norm_eps": hf.get("rms_norm_eps", default=1e-6),
            "attention_bias": hf.flag("attention_bias", default=False),
            "embedding_scale": common["hidden_size"] ** 0.5,
        }


def _activation(hf: HfConfig) -> str:
    """Returns ``hidden_activation``, else the older ``hidden_act``, where "gelu" means its approximation by tanh."""
    if hf.get("hidden_activation", default=None) is not None:
        return hf.activation("hidden_activation", default=_TANH_GELU)
    name = hf.activation("hidden_act", default=_TANH_GELU)
    return _TANH_GELU if name == "gelu" else name


@dataclass(frozen=True, kw_only=True)
class AlternatingGemmaConfig(GemmaBaseConfig):
    """Fields of the generations whose layers alternate between windowed and full attention."""

    query_pre_attn_scalar: float = 256.0  # scores are multiplied by its inverse root

    @classmethod
    def alternating_fields(cls, hf: HfConfig, layers: int, period: int) -> dict[str, Any]:
        """Returns the fields of attention over ``layers`` layers, every ``period``-th of which sees all tokens."""
        default = [SLIDING if (i + 1) % period else FULL for i in range(layers)]
        return {
            "sliding_window": hf.integer("sliding_window", default=4096, nullable=True),
            "layer_types": hf.layer_types(default),
            "query_pre_attn_scalar": hf.number("query_pre_attn_scalar", default=256.0),
        }


class GemmaBase(CausalLM):
    """Common to the models of every generation."""

    config: GemmaBaseConfig

    def make_norm(self) -> UnitOffsetRMSNorm:
        return UnitOffsetRMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
