"""Llama 4 for text (Scout and Maverick, Meta 2025): most layers attend in chunks, the others without positions.

Every layer, or every second one, is a mixture of experts with a shared one; an expert reads its tokens times the
sigmoid of their score. Queries and keys may be normed. Queries of layers without positions grow with the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.checks import check_integer
from lamella_core.config import FULL, SLIDING, ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import DecoderLayer
from lamella_core.layers.head_norm import PlainHeadNorm
from lamella_core.layers.mlp import FeedForward, GatedMLP
from lamella_core.layers.moe import MoE, SharedExpert, SigmoidRouter
from lamella_core.layers.norm import RMSNorm
from lamella_core.models._rules import attention_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

CHUNKED = "chunked_attention"


@dataclass(frozen=True, kw_only=True)
class Llama4Config(ModelConfig):
    """``intermediate_size`` is that of one expert, ``sliding_window`` the size of a chunk."""

    num_local_experts: int
    num_experts_per_tok: int
    dense_intermediate_size: int  # of layers without experts
    moe_layers: tuple[int, ...]
    unrotated_layers: tuple[int, ...]
    use_qk_norm: bool = True
    attention_bias: bool = False

    hf_model_types: ClassVar[tuple[str, ...]] = ("llama4_text", "llama4")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("moe_layers", "unrotated_layers"):
            for index in getattr(self, name):
                check_integer(f"an entry of {name}", index, 0, self.num_hidden_layers - 1)

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config: of the whole model, or of its decoder alone."""
        hf = hf.nested("text_config") if hf.model_type == "llama4" else hf
        common = hf.decoder_fields()
        layers = common["num_hidden_layers"]
        rotates = _layer_list(hf, "no_rope_layers")  # 1 for each layer that rotates, 0 for the others (so it is called)
        if rotates is None:
            interval = hf.integer("no_rope_layer_interval", default=4)
            rotates = [int((i + 1) % interval != 0) for i in range(layers)]
        step = hf.integer("interleave_moe_layer_step", default=1)
        sparse = _layer_list(hf, "moe_layers")
        kinds = hf.layer_types([CHUNKED if rotating else FULL for rotating in rotates])
        if any(kind not in (CHUNKED, FULL) for kind in kinds):
            raise ConfigError(f"{hf.where}: layer_types is {kinds}; allowed: {CHUNKED}, {FULL}")
        chunk = hf.integer("attention_chunk_size", default=8192, nullable=True)
        rope = hf.rope(common["head_dim"], default_theta=500000.0, interleaved=True)
        if hf.get("attn_temperature_tuning", default=True):  # a number in some files
            rope = replace(
                rope,
                temperature_length=hf.integer("floor_scale", default=8192),
                temperature_scale=hf.number("attn_scale", default=0.1),
            )
        return {
            **common,
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": rope,
            "sliding_window": chunk,
            "layer_types": [] if chunk is None else [SLIDING if kind == CHUNKED else FULL for kind in kinds],
            "num_local_experts": hf.integer("num_local_experts", "num_experts", default=16),
            "num_experts_per_tok": hf.integer("num_experts_per_tok", default=1),
            "dense_intermediate_size": hf.integer("intermediate_size_mlp"),
            "moe_layers": list(range(step - 1, layers, step)) if sparse is None else sparse,
            "unrotated_layers": [index for index, rotating in enumerate(rotates) if not rotating],
            "use_qk_norm": hf.flag("use_qk_norm", default=True),
            "attention_bias": hf.flag("attention_bias", default=False),
        }


def _layer_list(hf: HfConfig, name: str) -> list[int] | None:
    """Returns a list with or of layers; None if it is absent, null or empty."""
    given = hf.get(name, default=None)
    if given is not None and not (isinstance(given, list) and all(type(value) is int for value in given)):
        raise ConfigError(f"{hf.where}: {name} is {given!r}; it must be a list of integers")
    return given or None


def _feed_forward_rules() -> list[WeightRule]:
    source, target = "model.layers.{i}.feed_forward", "layers.{i}.mlp"
    return [
        *(
            rule
            for old, new in (("", ""), (".shared_expert", ".shared"))
            for rule in (
                *(
                    WeightRule(f"{source}{old}.{s}_proj.weight", f"{target}{new}.gate_up_proj.weight", section=s)
                    for s in ("gate", "up")
                ),
                WeightRule(f"{source}{old}.down_proj.weight", f"{target}{new}.down_proj.weight"),
            )
        ),
        WeightRule(f"{source}.router.weight", f"{target}.router.gate.weight"),
        WeightRule(f"{source}.experts.gate_up_proj", f"{target}.experts.gate_up_proj.weight", transpose=True),
        WeightRule(f"{source}.experts.down_proj", f"{target}.experts.down_proj.weight", transpose=True),
    ]


@register("Llama4ForConditionalGeneration", "Llama4ForCausalLM")
class Llama4ForCausalLM(CausalLM):
    """Pre-norm decoder: RMSNorm, grouped-query attention in chunks or over all, experts beside a shared one."""

    config: Llama4Config
    config_class = Llama4Config
    OUTER_PREFIX = "language_model."
    IGNORED = ("*.rotary_emb.*", "vision_model.*", "model.vision_model.*", "*multi_modal_projector.*")
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *_feed_forward_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        rotates = index not in config.unrotated_layers
        window = config.layer_window(index)
        normed = config.use_qk_norm and rotates
        return DecoderLayer(
            input_norm=self.make_norm(),
            attention=Attention(
                config,
                index,
                name=f"{name}.attention",
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                sliding_window=window,
                is_chunked=window is not None,
                q_norm=PlainHeadNorm(config) if normed else None,
                k_norm=PlainHeadNorm(config) if normed else None,
                use_rope=rotates,
            ),
            mlp_norm=self.make_norm(),
            mlp=self._feed_forward(index, f"{name}.mlp"),
        )

    def _feed_forward(self, index: int, name: str) -> FeedForward:
        config = self.config
        if index not in config.moe_layers:
            return GatedMLP(config, name=name, inner=config.dense_intermediate_size)
        experts, top_k, inner = config.num_local_experts, config.num_experts_per_tok, config.intermediate_size
        return MoE(
            config,
            num_experts=experts,
            top_k=top_k,
            inner=inner,
            name=name,
            router=SigmoidRouter(config, experts, top_k, name=f"{name}.router"),
            shared=SharedExpert(config, inner=inner, name=f"{name}.shared"),
            scale_inputs=True,
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
