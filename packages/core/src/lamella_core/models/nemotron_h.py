"""Nemotron-H and Nemotron 3 (NVIDIA 2025): layers of one norm each and Mamba-2, attention, an MLP or experts.

* Attention has no positions; MLPs and experts have no gate, and square what ReLU leaves.
* Experts stand beside a shared one, are chosen by biased sigmoid scores, and may read a smaller latent state.
* Layers that guess further tokens (multi-token prediction) are not read.
* Bounds of a step's length (time_step_limit) hold for every token, generated ones too.

Shape legend: T tokens, H hidden size; Mamba-2 has mamba_heads * mamba_head_dim channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import FeedForwardLayer, MixerLayer
from lamella_core.layers.group_routing import BiasedGroupRouter
from lamella_core.layers.mlp import MLP
from lamella_core.layers.moe import MoE
from lamella_core.layers.norm import RMSNorm
from lamella_core.layers.plain_experts import PlainExperts
from lamella_core.layers.state_space import Mamba2Mixer, Mamba2Sizes
from lamella_core.models._rules import module_rules
from lamella_core.models._state_space import backbone_rules, mixer_rules, time_step_limit
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

# Kinds of layers, as transformers calls them.
MAMBA, ATTENTION, MLP_LAYER, MOE_LAYER = "linear_attention", "full_attention", "mlp", "moe"
_KINDS = {"M": MAMBA, "*": ATTENTION, "-": MLP_LAYER, "E": MOE_LAYER, "mamba": MAMBA, "attention": ATTENTION}
_MIXER, _MLP = "backbone.layers.{i}.mixer", "layers.{i}.mlp"


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig(ModelConfig):
    """Nemotron-H's own fields."""

    block_types: tuple[str, ...]  # MAMBA, ATTENTION, MLP_LAYER or MOE_LAYER for each layer
    mamba_heads: int
    mamba_head_dim: int
    mamba_groups: int  # of heads that share b and c
    state_size: int
    conv_kernel: int = 4
    use_bias: bool = False  # of the mixers' projections in and out
    use_conv_bias: bool = True
    mlp_bias: bool = False
    dt_min: float = 0.0  # bounds of a step's length
    dt_max: float | None = None  # None: no bound
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688  # of one expert
    shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None  # what experts read; None: the hidden state
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True

    hf_model_types: ClassVar[tuple[str, ...]] = ("nemotron_h",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.block_types) != self.num_hidden_layers or MAMBA not in self.block_types:
            raise ConfigError(
                f"block_types is {self.block_types}; it needs a kind for each of the {self.num_hidden_layers} layers, "
                f"{MAMBA} among them"
            )

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        kinds = _block_types(hf)
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        hf.require("mamba_hidden_act", ("silu", "swish"), "silu")
        hf.require("attention_bias", (False,), False)
        hf.get("num_hidden_layers", default=None)
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": len(kinds),
            "num_attention_heads": heads,
            "num_key_value_heads": hf.integer("num_key_value_heads", default=heads),
            "head_dim": hf.integer("head_dim", "attention_head_dim", default=128),
            "intermediate_size": hf.integer("intermediate_size"),
            "max_position_embeddings": hf.integer("max_position_embeddings", default=4096),
            "hidden_act": hf.activation("mlp_hidden_act", default="relu2"),
            "norm_eps": hf.get("layer_norm_epsilon", "rms_norm_eps", default=1e-5),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=False),
            **hf.token_ids(),
            **time_step_limit(hf),
            "block_types": kinds,
            "mamba_heads": hf.integer("mamba_num_heads", default=128),
            "mamba_head_dim": hf.integer("mamba_head_dim", default=64),
            "mamba_groups": hf.integer("n_groups", "mamba_n_groups", default=8),
            "state_size": hf.integer("ssm_state_size", default=128),
            "conv_kernel": hf.integer("conv_kernel", "mamba_d_conv", default=4),
            "use_bias": hf.flag("use_bias", default=False),
            "use_conv_bias": hf.flag("use_conv_bias", default=True),
            "mlp_bias": hf.flag("mlp_bias", default=False),
            **_expert_fields(hf),
        }


def _expert_fields(hf: HfConfig) -> dict[str, Any]:
    hf.require("n_shared_experts", (1,), 1)
    return {
        "num_experts": hf.integer("n_routed_experts", "num_local_experts", default=8),
        "num_experts_per_tok": hf.integer("num_experts_per_tok", default=2),
        "moe_intermediate_size": hf.integer("moe_intermediate_size", default=7688),
        "shared_expert_intermediate_size": hf.integer("moe_shared_expert_intermediate_size", default=7688),
        "moe_latent_size": hf.integer("moe_latent_size", default=None, nullable=True),
        "n_group": hf.integer("n_group", default=1),
        "topk_group": hf.integer("topk_group", default=1),
        "routed_scaling_factor": hf.number("routed_scaling_factor", default=1.0),
        "norm_topk_prob": hf.flag("norm_topk_prob", default=True),
    }


def _block_types(hf: HfConfig) -> list[str]:
    """Returns the kind of each layer, from a list or from a pattern such as "M-M*".

    Raises:
        ConfigError: a kind that is not supported.
    """
    given = hf.get("layers_block_type", "layer_types", default=None) or hf.get("hybrid_override_pattern", default=None)
    if not isinstance(given, (str, list)):
        raise ConfigError(f"{hf.where}: layers_block_type is {given!r}; it must be a list, or the pattern text")
    kinds = [_KINDS.get(kind, kind) if isinstance(kind, str) else str(kind) for kind in given]
    for kind in kinds:
        if kind not in _KINDS.values():
            raise ConfigError(
                f"{hf.where}: a layer is of kind {kind!r}; {hf.architecture} supports {MAMBA} (M), {ATTENTION} (*), "
                f"{MLP_LAYER} (-) and {MOE_LAYER} (E)"
            )
    return kinds


def _expert_rules() -> list[WeightRule]:
    """Router, experts (one by one as published, or all in one as transformers has them), shared expert and latents."""
    parts = (("up_proj", "gate_up_proj"), ("down_proj", "down_proj"))
    modules = {f"shared_experts.{name}": f"shared.{name}" for name, _ in parts}
    modules |= {"fc1_latent_proj": "experts.to_latent", "fc2_latent_proj": "experts.from_latent"}
    return [
        WeightRule(f"{_MIXER}.gate.weight", f"{_MLP}.router.gate.weight"),
        WeightRule(f"{_MIXER}.gate.e_score_correction_bias", f"{_MLP}.router.correction_bias"),
        *(
            WeightRule(source, f"{_MLP}.experts.{new}.weight")
            for old, new in parts
            for source in (f"{_MIXER}.experts.{{e}}.{old}.weight", f"{_MIXER}.experts.{old}")
        ),
        *module_rules(modules, f"{_MIXER}.", f"{_MLP}."),
    ]


@register("NemotronHForCausalLM")
class NemotronHForCausalLM(CausalLM):
    """Pre-norm layers, each of which does one thing."""

    config: NemotronHConfig
    config_class = NemotronHConfig
    has_states = True
    SOURCE_PREFIX = "backbone."
    IGNORED = ("mtp.*",)
    WEIGHTS = (
        *backbone_rules(),
        *mixer_rules(),
        *(WeightRule(f"{_MIXER}.{s}_proj.weight", "layers.{i}.mixer.qkv_proj.weight", section=s) for s in "qkv"),
        WeightRule(f"{_MIXER}.o_proj.weight", "layers.{i}.mixer.o_proj.weight"),
        *module_rules({"up_proj": "up_proj", "down_proj": "down_proj"}, f"{_MIXER}.", f"{_MLP}."),
        *_expert_rules(),
    )

    def weight_rules(self, source_names: Collection[str]) -> list[WeightRule]:
        """Returns the rules; transformers holds what the published files call "backbone." as "model."."""
        if not any(name.startswith("model.") for name in source_names):
            return super().weight_rules(source_names)
        rules = super().weight_rules([name.replace("model.", "backbone.", 1) for name in source_names])
        return [dataclasses.replace(rule, source=rule.source.replace("backbone.", "model.", 1)) for rule in rules]

    def make_layer(self, index: int) -> nn.Module:
        config, kind, name = self.config, self.config.block_types[index], f"layers.{index}.mixer"
        if kind == MLP_LAYER:
            return FeedForwardLayer(
                norm=self.make_norm(), mlp=MLP(config, name=f"layers.{index}.mlp", bias=config.mlp_bias)
            )
        if kind == MOE_LAYER:
            return FeedForwardLayer(norm=self.make_norm(), mlp=self._experts(f"layers.{index}.mlp"))
        if kind == ATTENTION:
            return MixerLayer(norm=self.make_norm(), mixer=Attention(config, index, name=name))
        sizes = Mamba2Sizes(
            heads=config.mamba_heads,
            head_dim=config.mamba_head_dim,
            groups=config.mamba_groups,
            state_size=config.state_size,
            conv_width=config.conv_kernel,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
        )
        mixer = Mamba2Mixer(config, index, sizes, name=name, bias=config.use_bias, conv_bias=config.use_conv_bias)
        return MixerLayer(norm=self.make_norm(), mixer=mixer)

    def _experts(self, name: str) -> MoE:
        config = self.config
        count, top_k, inner = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
        router = BiasedGroupRouter(
            config,
            count,
            top_k,
            name=f"{name}.router",
            num_groups=config.n_group,
            top_groups=config.topk_group,
            weight_scale=config.routed_scaling_factor,
            renormalize=config.norm_topk_prob,
        )
        latent, bias = config.moe_latent_size, config.mlp_bias
        experts = PlainExperts(config, count, inner, name=f"{name}.experts", latent=latent, latent_bias=bias)
        size = config.shared_expert_intermediate_size
        shared = MLP(config, name=f"{name}.shared", bias=bias, inner=size, reduce=False)
        return MoE(
            config,
            num_experts=count,
            top_k=top_k,
            inner=inner,
            name=name,
            router=router,
            experts=experts,
            shared=shared,
        )

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
