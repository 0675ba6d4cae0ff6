"""DeciLM and Nemotron-NAS (Bercovich et al. 2024, "Puzzle"): Llama with layers that differ from one another.

DeciLM-7B varies the number of key/value heads. In Nemotron-NAS a layer's attention or feed-forward may also be left
out, together with its norm, or be one linear map; inner sizes vary too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from lamella_core.checkpoint.rules import WeightRule
from lamella_core.checks import check_integer, check_number
from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.errors import ConfigError
from lamella_core.hf_config import HfConfig
from lamella_core.layers.attention import Attention
from lamella_core.layers.linear import ReplicatedLinear
from lamella_core.layers.mlp import GatedMLP
from lamella_core.layers.norm import Norm, RMSNorm
from lamella_core.layers.rotary import Rotation
from lamella_core.models._rules import attention_rules, gated_mlp_rules, norm_rules, vocabulary_rules
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import register

LEFT_OUT, LINEAR = 0, -1  # in place of a layer's number of key/value heads or inner size
_INNER_MULTIPLE = 256
_UNSUPPORTED = (
    "window_length",
    "num_sink_tokens",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
    "sparsify",
)


@dataclass(frozen=True, kw_only=True)
class DeciConfig(ModelConfig):
    """Sizes by layer; the fields of all layers hold the largest."""

    layer_kv_heads: tuple[int, ...]  # or LEFT_OUT, LINEAR
    layer_inner: tuple[int, ...]  # of the feed-forward; or LEFT_OUT, LINEAR

    hf_model_types: ClassVar[tuple[str, ...]] = ("nemotron-nas", "deci")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layer_kv_heads", "layer_inner"):
            sizes = getattr(self, name)
            if len(sizes) != self.num_hidden_layers:
                raise ConfigError(f"{name} has {len(sizes)} entries for {self.num_hidden_layers} layers")
            for size in sizes:
                check_integer(f"an entry of {name}", size, LINEAR)
        if not any(heads > 0 for heads in self.layer_kv_heads):
            raise ConfigError("layer_kv_heads: no layer has attention; at least one must")

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the fields read from a Hugging Face config."""
        hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
        layers = hf.integer("num_hidden_layers")
        blocks = hf.get("block_configs", default=None)
        if blocks is None:
            kv_heads = hf.get("num_key_value_heads_per_layer", default=None)
            kv_heads = [hf.integer("num_key_value_heads", default=heads)] * layers if kv_heads is None else kv_heads
            inner = [hf.integer("intermediate_size")] * layers
        else:
            kv_heads, inner = _read_blocks(hf, blocks, hidden, heads)
        if not isinstance(kv_heads, list) or not all(type(size) is int for size in kv_heads):
            raise ConfigError(
                f"{hf.where}: num_key_value_heads_per_layer is {kv_heads!r}; it must be a list of integers"
            )
        head_dim = hf.head_dim(hidden, heads)
        return {
            "vocab_size": hf.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max([1, *kv_heads]),
            "head_dim": head_dim,
            "intermediate_size": max([1, *inner]),
            "layer_kv_heads": kv_heads,
            "layer_inner": inner,
            "max_position_embeddings": hf.integer("max_position_embeddings"),
            "hidden_act": hf.activation("hidden_act", default="silu"),
            "tie_word_embeddings": hf.flag("tie_word_embeddings", default=False),
            "norm_eps": hf.get("rms_norm_eps", default=1e-5),
            "rope": hf.rope(head_dim),
            **hf.token_ids(),
        }


def _read_blocks(hf: HfConfig, blocks: object, hidden: int, heads: int) -> tuple[list[int], list[int]]:
    """Returns key/value heads and inner size of each layer from ``block_configs``."""
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise ConfigError(f"{hf.where}: block_configs must be a list of objects, one per layer")
    kv_heads, inner = [], []
    for index, block in enumerate(blocks):
        where = f"{hf.where}: block_configs[{index}]"
        attention, ffn = (_part(block, name, where) for name in ("attention", "ffn"))
        kind = _replacement(attention)
        if kind is None:
            group: Any = attention.get("n_heads_in_group")
            check_integer(f"{where}.attention.n_heads_in_group", group, 1, heads)
            kind = heads // group
        kv_heads.append(kind)
        kind = _replacement(ffn)
        if kind is None:
            check_number(f"{where}.ffn.ffn_mult", ffn.get("ffn_mult"), positive=True)
            kind = -(-int(2 * ffn["ffn_mult"] * hidden / 3) // _INNER_MULTIPLE) * _INNER_MULTIPLE
        inner.append(kind)
    return kv_heads, inner


def _part(block: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    part = block.get(name)
    if not isinstance(part, dict):
        raise ConfigError(f"{where}.{name} is {part!r}; it must be an object")
    for key in _UNSUPPORTED:
        if part.get(key):
            raise ConfigError(f"{where}.{name}.{key} is {part[key]!r}; only layers without it are supported")
    return part


def _replacement(part: dict[str, Any]) -> int | None:
    if part.get("no_op"):
        return LEFT_OUT
    return LINEAR if part.get("replace_with_linear") else None


class DeciLayer(nn.Module):
    """Pre-norm decoder layer of which either half may be missing, with its norm.

    ``attention`` and ``mlp`` may be a `ReplicatedLinear` in place of the usual.
    """

    selects_rows = True

    def __init__(
        self,
        input_norm: Norm | None,
        attention: Attention | ReplicatedLinear | None,
        mlp_norm: Norm | None,
        mlp: GatedMLP | ReplicatedLinear | None,
    ) -> None:
        super().__init__()
        self.input_norm, self.attention = input_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation | None,
        ctx: ForwardContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(self.attention, Attention) and self.input_norm is not None:
            normed, residual = self.input_norm(hidden, residual, self.attention.input_scale)
            hidden = self.attention(normed, rotation, ctx, rows)
        elif rows is not None:
            hidden = hidden.index_select(0, rows)
        if rows is not None and residual is not None:
            residual = residual.index_select(0, rows)
        if not hidden.shape[0]:
            return hidden, residual
        if isinstance(self.attention, ReplicatedLinear) and self.input_norm is not None:
            normed, residual = self.input_norm(hidden, residual, self.attention.input_scale)
            hidden = self.attention(normed, ctx)
        if self.mlp is not None and self.mlp_norm is not None:
            normed, residual = self.mlp_norm(hidden, residual, self.mlp.input_scale)
            hidden = self.mlp(normed, ctx)
        return hidden, residual


def _linear_rules() -> Sequence[WeightRule]:
    names = {"self_attn.linear_attn": "attention", "mlp.linear_mlp": "mlp"}
    return [
        WeightRule(f"model.layers.{{i}}.{source}.weight", f"layers.{{i}}.{target}.weight")
        for source, target in names.items()
    ]


@register("DeciLMForCausalLM")
class DeciLMForCausalLM(CausalLM):
    """Pre-norm decoder of unequal layers."""

    config: DeciConfig
    config_class = DeciConfig
    IGNORED = ("*.rotary_emb.inv_freq",)
    WEIGHTS = (*vocabulary_rules(), *norm_rules(), *attention_rules(), *gated_mlp_rules(), *_linear_rules())

    def make_layer(self, index: int) -> nn.Module:
        config, name = self.config, f"layers.{index}"
        kv_heads, inner = config.layer_kv_heads[index], config.layer_inner[index]
        attention: Attention | ReplicatedLinear | None = None
        mlp: GatedMLP | ReplicatedLinear | None = None
        if kv_heads == LINEAR:
            attention = self._linear(f"{name}.attention")
        elif kv_heads != LEFT_OUT:
            attention = Attention(replace(config, num_key_value_heads=kv_heads), index, name=f"{name}.attention")
        if inner == LINEAR:
            mlp = self._linear(f"{name}.mlp")
        elif inner != LEFT_OUT:
            mlp = GatedMLP(config, name=f"{name}.mlp", inner=inner)
        return DeciLayer(
            self.make_norm() if attention is not None else None, attention, self.make_norm() if mlp else None, mlp
        )

    def _linear(self, name: str) -> ReplicatedLinear:
        hidden = self.config.hidden_size
        return ReplicatedLinear(hidden, hidden, False, config=self.config, name=name)

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.torch_dtype)
