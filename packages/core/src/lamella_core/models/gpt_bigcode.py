"""GPTBigCode (Allal et al. 2023, Li et al. 2023): SantaCoder and StarCoder, GPT-2 with one head of keys and values.

Checkpoints of SantaCoder in their first form (GPT2LMHeadCustomModel) hold queries apart from keys and values, and
weights as [in, out].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.hf_config import HfConfig
from lamella_core.models._rules import interleaved_qkv_rules, module_rules
from lamella_core.models.gpt2 import GPT2Config, GPT2LMHeadModel
from lamella_core.models.registry import register


@dataclass(frozen=True, kw_only=True)
class GPTBigCodeConfig(GPT2Config):
    """No fields of its own: ``num_key_value_heads`` is 1 with multi-query attention."""

    hf_model_types: ClassVar[tuple[str, ...]] = ("gpt_bigcode",)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        fields = super().from_hf(hf)
        if hf.flag("multi_query", default=True):
            fields["num_key_value_heads"] = 1
        fields["hidden_act"] = hf.activation("activation_function", default="gelu_pytorch_tanh")
        return fields


@dataclass(frozen=True, kw_only=True)
class SantaCoderConfig(GPT2Config):
    """The first form of SantaCoder's configuration: GPT-2's, with an attention_head_type."""

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        fields = super().from_hf(hf)
        if hf.require("attention_head_type", ("multiquery", "multihead"), "multiquery") == "multiquery":
            fields["num_key_value_heads"] = 1
        return fields


def _rules() -> list[WeightRule]:
    """GPT-2's rules, with weights that are stored [out, in] and heads that are stored one after the other."""
    source, target = "transformer.h.{i}.", "layers.{i}."
    others = {"attn.c_proj": "attention.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    linears = (*(f"{target}{name}." for name in others.values()), f"{target}attention.qkv_proj.")
    return [
        *(rule for rule in GPT2LMHeadModel.WEIGHTS if not rule.target.startswith(linears)),
        *interleaved_qkv_rules(f"{source}attn.c_attn"),
        *module_rules(others, source, target),
    ]


def _santacoder_rules() -> list[WeightRule]:
    """GPT-2's rules, and the split projections of multi-query attention."""
    source, target = "transformer.h.{i}.attn", "layers.{i}.attention.qkv_proj"
    sections: dict[str, str | tuple[str, ...]] = {"q_attn": "q", "kv_attn": ("k", "v")}
    return [
        *GPT2LMHeadModel.WEIGHTS,
        *(
            WeightRule(f"{source}.{name}.{leaf}", f"{target}.{leaf}", section=section, transpose=leaf == "weight")
            for name, section in sections.items()
            for leaf in ("weight", "bias")
        ),
    ]


@register("GPTBigCodeForCausalLM")
class GPTBigCodeForCausalLM(GPT2LMHeadModel):
    """Pre-norm decoder: LayerNorm, multi-query attention, learned positions, plain MLP."""

    config: GPTBigCodeConfig
    config_class = GPTBigCodeConfig
    WEIGHTS = tuple(_rules())


@register("GPT2LMHeadCustomModel")
class GPT2LMHeadCustomModel(GPT2LMHeadModel):
    """SantaCoder as it was first published."""

    config: SantaCoderConfig
    config_class = SantaCoderConfig
    WEIGHTS = tuple(_santacoder_rules())
