"""What one tensor-parallel rank holds of each layer, read from a model without memory: exact, padding included."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.context import AttentionSpec, StateSpec
from lamella_core.layers.linear import Linear, RowParallelLinear
from lamella_core.layers.moe import GatedExperts, MoE, Router
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class

_TILE = 128  # outputs that a matrix unit computes at once: narrower experts leave part of it idle


@dataclass(frozen=True)
class LayerShape:
    """One layer on one rank. FLOP are of one token; those of experts with the router's choices spread evenly."""

    weight_bytes: int  # without experts
    flops: float
    fp8_flops: float
    kv_bytes: int  # of one token
    state_bytes: int  # of one request, whatever its length
    window: int | None  # last tokens that a query sees; None: all
    num_reductions: int  # all-reduces of [tokens, hidden]
    expert_bytes: int = 0
    expert_flops: float = 0.0
    expert_fp8_flops: float = 0.0
    num_experts: int = 0  # on this rank
    chosen: float = 0.0  # part of the tokens that go to one expert
    num_choices: int = 0  # experts of a token
    expert_split: int = 1  # moe_ep_size

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.expert_bytes


@dataclass(frozen=True)
class ShardShape:
    """A whole model, split over tensor-parallel ranks only, as the rank that holds most has it."""

    layers: tuple[LayerShape, ...]
    first_bytes: int  # what only the first stage holds: embeddings
    head_bytes: int
    head_flops: float
    vocab_size: int
    hidden_bytes: int  # of one token's hidden state
    is_tied: bool  # the output layer reads the embedding, where one rank has both

    def stage_bytes(self, mapping: Mapping, stage: int) -> int:
        """Returns the bytes of weights on one rank of a pipeline stage."""
        seen = mapping.with_rank(stage * mapping.tp_size)
        total = sum(self.layers[index].total_bytes for index in seen.pp_layers(len(self.layers)))
        total += self.first_bytes if seen.is_first_pp_rank else 0
        shares = self.is_tied and mapping.pp_size == 1
        return total + (self.head_bytes if seen.is_last_pp_rank and not shares else 0)


def shard_shape(config: ModelConfig, mapping: Mapping) -> ShardShape:
    """Returns what the first rank of ``mapping``, which has one pipeline stage, holds.

    Raises:
        ConfigError: the model cannot be split that way; the message says why.
    """
    config = config.with_mapping(mapping)
    model = get_model_class(config.architecture, config.model_type).empty(config)
    attention, states = defaultdict(list), defaultdict(list)
    for spec in model.attention_specs():
        attention[spec.layer_idx].append(spec)
    for state in model.state_specs():
        states[state.layer_idx].append(state)
    layers = [model.layers[str(index)] for index in range(config.num_hidden_layers)]
    own_head = 0 if model.lm_head is None else _bytes(model.lm_head)
    last = own_head + (0 if model.norm is None else _bytes(model.norm))
    is_tied = config.tie_word_embeddings and model.embed_tokens is not None
    head = _bytes(model.embed_tokens) if is_tied and model.embed_tokens is not None else own_head
    return ShardShape(
        layers=tuple(_layer_shape(layer, attention[i], states[i], config) for i, layer in enumerate(layers)),
        first_bytes=model.weight_bytes() - last - sum(_bytes(layer) for layer in layers),
        head_bytes=head,
        head_flops=2 * head / config.torch_dtype.itemsize,
        vocab_size=config.vocab_size,
        hidden_bytes=config.hidden_size * config.torch_dtype.itemsize,
        is_tied=is_tied,
    )


def _layer_shape(
    layer: nn.Module, specs: list[AttentionSpec], states: list[StateSpec], config: ModelConfig
) -> LayerShape:
    experts = [module for module in layer.modules() if isinstance(module, GatedExperts)]
    stacked = [linear for module in experts for linear in (module.gate_up_proj, module.down_proj)]
    dense = [module for module in layer.modules() if isinstance(module, Linear) and module not in stacked]
    summing = [module for module in layer.modules() if isinstance(module, (RowParallelLinear, MoE)) and module.reduce]
    left = sum(getattr(layer, name, False) for name in ("sums_hidden", "sums_attended", "sums_both"))  # to its norms
    expert_bytes = sum(_bytes(module) for module in stacked)
    itemsize = 1 if config.quantization.kv_cache_quant_algo is not None else config.torch_dtype.itemsize
    windows = [spec.sliding_window for spec in specs]
    flops, fp8_flops = _flops(dense)
    shape = LayerShape(
        weight_bytes=_bytes(layer) - expert_bytes,
        flops=flops,
        fp8_flops=fp8_flops,
        kv_bytes=itemsize * sum(spec.cache_width for spec in specs),
        state_bytes=sum(state.num_bytes for state in states),
        window=None if None in windows or not windows else max(w for w in windows if w is not None),
        num_reductions=len(summing) + left,
    )
    return _with_experts(shape, layer, stacked, config) if stacked else shape


def _with_experts(shape: LayerShape, layer: nn.Module, stacked: list[Linear], config: ModelConfig) -> LayerShape:
    experts = next(module for module in layer.modules() if isinstance(module, GatedExperts))
    router = next((module for module in layer.modules() if isinstance(module, Router)), None)
    held, split = len(experts.local_experts), config.mapping.moe_ep_size
    top_k = 1 if router is None else router.top_k
    chosen = min(1.0, top_k / (held * split))
    inner = experts.down_proj.in_features_local
    idle = -(-inner // _TILE) * _TILE / inner  # 1 where the width fills the tiles
    flops, fp8_flops = _flops(stacked)
    return replace(
        shape,
        expert_bytes=sum(_bytes(module) for module in stacked),
        expert_flops=flops * chosen * idle,
        expert_fp8_flops=fp8_flops * chosen * idle,
        num_experts=held,
        chosen=chosen,
        num_choices=top_k,
        expert_split=split,
    )


def _flops(linears: list[Linear]) -> tuple[float, float]:
    """Returns the FLOP of one token in the model's dtype and in float8."""
    float8 = sum(2 * linear.weight.numel() for linear in linears if linear.weight.itemsize == 1)
    return float(sum(2 * linear.weight.numel() for linear in linears) - float8), float(float8)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
