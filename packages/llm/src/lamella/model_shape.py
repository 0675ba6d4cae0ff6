"""ModelShape: what a model's speed depends on, read off its modules without their weights.

What a decode step reads of a mixture of experts depends on its tokens. Routing is taken as uniformly random, each token
choosing k of E experts independently of the others: B tokens are expected to meet E * (1 - (1 - k / E)^B) of them.
Trained routers are less even and meet fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from lamella_core.config import ModelConfig
from lamella_core.context import AttentionSpec
from lamella_core.errors import ConfigError
from lamella_core.layers.linear import Linear
from lamella_core.layers.moe import MoE
from lamella_core.mapping import Mapping
from lamella_core.models.base import CausalLM
from lamella_core.models.registry import get_model_class
from lamella_core.quantization.config import QuantAlgo, QuantConfig

_FP8 = frozenset({QuantAlgo.FP8, QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN, QuantAlgo.FP8_BLOCK_SCALES})
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention costs."""

    query_width: int  # query heads x head size
    kv_bytes: int  # keys and values of one token
    window: int | None  # last tokens a query sees; None: all
    is_chunked: bool = False  # a query sees its own chunk of ``window`` tokens instead, up to itself

    def visible(self, context: float) -> float:
        """Returns how many tokens the query after ``context`` others sees of them."""
        if self.window is None:
            return context
        return context % self.window if self.is_chunked else min(context, self.window)

    def mean_visible(self, isl: int, osl: int) -> float:
        """Returns what a query sees on average while the context grows from ``isl`` to ``isl + osl``."""
        return (self._seen(isl + osl) - self._seen(isl)) / osl

    def causal_area(self, isl: int) -> float:
        """Returns twice the number of (query, key) pairs of a prompt, without the diagonal's half."""
        return 2 * self._seen(isl)

    def _seen(self, length: int) -> float:
        """Returns `visible` summed over contexts from 0 to ``length``, as an integral."""
        window = self.window
        if window is None or length <= window:
            return length**2 / 2
        if self.is_chunked:
            return (length // window * window**2 + (length % window) ** 2) / 2
        return window**2 / 2 + (length - window) * window


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer that tokens are routed to."""

    num_experts: int
    top_k: int
    params: int  # numbers in the matrices of one expert
    fp8_params: int  # of those, how many are float8
    num_bytes: int  # of one expert

    def hit(self, batch: float) -> float:
        """Returns how many experts ``batch`` tokens are expected to meet if each chooses at random."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** batch)


@dataclass(frozen=True)
class ModelShape:
    """A model on one GPU, reduced to what its speed depends on.

    ``linear_*`` are of the matrices that every token meets, in all layers: routers and shared experts are among them.
    """

    linear_params: int  # numbers
    linear_fp8_params: int  # of those, how many are float8, weights and activations
    linear_bytes: int
    head_params: int  # of the output layer
    head_bytes: int
    weight_bytes: int  # held in memory: embedding, norms and all experts included
    layers: tuple[LayerAttention, ...]
    experts: tuple[LayerExperts, ...] = ()  # of each layer that has some

    @classmethod
    def of(cls, config: ModelConfig) -> ModelShape:
        """Returns the shape of the whole model, quantized as ``config.quantization`` says.

        Raises:
            ConfigError: a dtype, scheme or kind of layer whose cost is not known here.
        """
        dtype, quantization = config.torch_dtype, config.quantization
        _check_numbers(config)
        model = _empty(config, QuantConfig())
        specs = model.attention_specs()
        _check_layers(model, specs)
        float8 = _float8_linears(config)
        mixtures = [module for module in model.layers.modules() if isinstance(module, MoE)]
        experts = tuple(_experts(moe, float8, dtype) for moe in mixtures)
        routed = {linear for moe in mixtures for linear in _routed(moe)}
        total, fp8, num_bytes = _count((linear for linear in _linears(model) if linear not in routed), float8, dtype)
        all_fp8 = fp8 + sum(layer.num_experts * layer.fp8_params for layer in experts)
        head = config.vocab_size * config.hidden_size
        kv_itemsize = 1 if quantization.kv_cache_quant_algo else dtype.itemsize
        return cls(
            linear_params=total,
            linear_fp8_params=fp8,
            linear_bytes=num_bytes,
            head_params=head,
            head_bytes=head * dtype.itemsize,
            weight_bytes=model.weight_bytes() - all_fp8 * (dtype.itemsize - 1),
            layers=tuple(
                LayerAttention(s.num_heads * s.head_dim, s.cache_width * kv_itemsize, s.sliding_window, s.is_chunked)
                for s in specs
            ),
            experts=experts,
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def window(self) -> int | None:
        """How far back some layer looks, so how long a token must be kept; None: to the end."""
        windows = [layer.window for layer in self.layers]
        return None if None in windows else max(w for w in windows if w is not None)


def _check_numbers(config: ModelConfig) -> None:
    if config.torch_dtype not in _HALVES:
        raise ConfigError(f"dtype is {config.dtype}; the roofline knows bfloat16 and float16 models")
    for name in (config.quantization.quant_algo, config.quantization.kv_cache_quant_algo):
        if name is not None and name not in _FP8:
            raise ConfigError(f"the roofline knows no {name.value}; known: {', '.join(sorted(a.value for a in _FP8))}")


def _check_layers(model: CausalLM, specs: Sequence[AttentionSpec]) -> None:
    """Raises ConfigError for layers that cost something else than the formulae count."""
    routed = {linear for module in model.modules() if isinstance(module, MoE) for linear in _routed(module)}
    unknown = {
        "generates no text": model.task != "generate",
        "keeps states of sequences, whose reads and scans are not counted": bool(model.state_specs()),
        "has latent attention, whose decode steps are bound by arithmetic too": any(s.is_latent for s in specs),
        "has sparse attention, which does not read all keys": any(s.sparsity is not None for s in specs),
        "stacks weights that are no mixture's": any(x.experts is not None and x not in routed for x in _linears(model)),
    }
    for what, is_so in unknown.items():
        if is_so:
            raise ConfigError(f"{model.config.architecture} {what}; the roofline knows attention and experts only")


def _empty(config: ModelConfig, quantization: QuantConfig) -> CausalLM:
    """Returns the whole model without memory, quantized in another way."""
    whole = replace(config, quantization=quantization, mapping=Mapping())
    return get_model_class(config.architecture, config.model_type).empty(whole)


def _linears(model: CausalLM) -> list[Linear]:
    return [module for module in model.layers.modules() if isinstance(module, Linear)]


def _float8_linears(config: ModelConfig) -> set[str]:
    """Returns the names of the linears that a float8 scheme quantizes: not routers, nor what the config excludes."""
    quantization = config.quantization
    if quantization.quant_algo is None:
        return set()
    probe = _empty(config, QuantConfig(QuantAlgo.FP8, exclude_modules=quantization.exclude_modules))
    return {linear.name for linear in _linears(probe) if linear.weight.dtype == torch.float8_e4m3fn}


def _routed(moe: MoE) -> tuple[Linear, Linear]:
    return moe.experts.gate_up_proj, moe.experts.down_proj


def _experts(moe: MoE, float8: set[str], dtype: torch.dtype) -> LayerExperts:
    of_all = _count(_routed(moe), float8, dtype)
    held = moe.experts.num_experts
    return LayerExperts(held, moe.router.top_k, *(number // held for number in of_all))


def _count(linears: Iterable[Linear], float8: set[str], dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the numbers in matrices, how many of them are float8, and their bytes."""
    total = fp8 = 0
    for linear in linears:
        size = linear.weight.numel()
        total += size
        fp8 += size if linear.name in float8 else 0
    return total, fp8, total * dtype.itemsize - fp8 * (dtype.itemsize - 1)
