"""The speed that a GPU's memory bandwidth and arithmetic rate allow a dense model, by calculation alone.

A request of I prompt and O generated tokens that runs among B others costs, in seconds of the GPU:

* prefill: 2 FLOP per weight of the layers and prompt token, and 2 x (query heads x head size) x I^2 per layer for the
  causal half of the attention, at `PREFILL_ATTENTION_EFFICIENCY` of the bfloat16 rate;
* linears: each decode step reads every weight once for B tokens, or is bound by their FLOPs if those take longer;
* KV cache: each decode step reads the keys and values of the context so far; every token's are written once.

Serial bound: these after one another, which a stream of separate kernels can reach. Overlap bound: all FLOPs beside all
bytes, a ceiling for anything. B follows from the memory: as many requests as fit at half their output.
N GPUs count as one of N times the memory, bandwidth and arithmetic rate, whose links take no time.
(Williams, Waterman and Patterson 2009 for the model of bandwidth and arithmetic bounds.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lamella_core.config import ModelConfig
from lamella_core.errors import ConfigError
from lamella_core.hardware import KNOWN_HARDWARE, Hardware, find_hardware
from lamella_core.layers.linear import Linear
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_core.quantization.config import QuantAlgo, QuantConfig
from lamella_core.quantization.modules import is_excluded

__all__ = ["KNOWN_HARDWARE", "Hardware", "LayerAttention", "ModelShape", "Roofline", "find_hardware"]

PREFILL_ATTENTION_EFFICIENCY = 0.75  # of the bfloat16 rate; what the fastest causal kernels reach
WORKSPACE_BYTES = 2.5 * (1 << 30)  # activations, graphs and workspaces of a serving process, one per GPU

_GIB = 1 << 30
_FP8 = frozenset({QuantAlgo.FP8, QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN, QuantAlgo.FP8_BLOCK_SCALES})
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention costs."""

    query_width: int  # query heads x head size
    kv_bytes: int  # keys and values of one token
    window: int | None  # last tokens a query sees; None: all


@dataclass(frozen=True)
class ModelShape:
    """A dense model on one GPU, reduced to what its speed depends on."""

    linear_params: int  # numbers in the matrices of all layers
    linear_fp8_params: int  # of those, how many are float8, weights and activations
    linear_bytes: int
    head_params: int  # of the output layer
    head_bytes: int
    weight_bytes: int  # held in memory, embedding and norms included
    layers: tuple[LayerAttention, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> ModelShape:
        """Returns the shape of the whole model, quantized as ``config.quantization`` says.

        Raises:
            ConfigError: a mixture of experts, whose reads depend on the batch, or a dtype or scheme without a roofline.
        """
        dtype, quantization = config.torch_dtype, config.quantization
        if dtype not in _HALVES:
            raise ConfigError(f"dtype is {config.dtype}; the roofline knows bfloat16 and float16 models")
        for name in (quantization.quant_algo, quantization.kv_cache_quant_algo):
            if name is not None and name not in _FP8:
                raise ConfigError(
                    f"the roofline knows no {name.value}; known: {', '.join(sorted(a.value for a in _FP8))}"
                )
        plain = replace(config, quantization=QuantConfig(), mapping=Mapping())
        model = get_model_class(config.architecture, config.model_type).empty(plain)
        linears = [module for module in model.layers.modules() if isinstance(module, Linear)]
        if any(linear.experts is not None for linear in linears):
            raise ConfigError(f"{config.architecture} is a mixture of experts; the roofline knows dense models")
        sizes = {linear.name: linear.in_features_local * linear.out_features_local for linear in linears}
        total = sum(sizes.values())
        fp8 = 0
        if quantization.quant_algo is not None:
            fp8 = sum(size for name, size in sizes.items() if not is_excluded(config, name))
        head = config.vocab_size * config.hidden_size
        kv_itemsize = 1 if quantization.kv_cache_quant_algo else dtype.itemsize
        return cls(
            linear_params=total,
            linear_fp8_params=fp8,
            linear_bytes=total * dtype.itemsize - fp8 * (dtype.itemsize - 1),
            head_params=head,
            head_bytes=head * dtype.itemsize,
            weight_bytes=model.weight_bytes() - fp8 * (dtype.itemsize - 1),
            layers=tuple(
                LayerAttention(s.num_heads * s.head_dim, s.cache_width * kv_itemsize, s.sliding_window)
                for s in model.attention_specs()
            ),
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


@dataclass(frozen=True)
class Roofline:
    """Bounds for one model on one GPU; every time is in seconds."""

    model: ModelShape
    hardware: Hardware

    @cached_property
    def kv_tokens(self) -> float:
        """Tokens whose keys and values fit beside weights and workspaces; 0 if not even those fit."""
        workspaces = self.hardware.count * WORKSPACE_BYTES
        room = self.hardware.memory_bytes - workspaces - self.model.weight_bytes
        return max(0.0, room / self.model.kv_bytes)

    def concurrency(self, isl: int, osl: int, most: float | None = None) -> float:
        """Returns how many requests run at once, on average, at most ``most``; blocks are taken as they are needed.

        Raises:
            ConfigError: the model does not fit into the GPU's memory.
        """
        fitting = self.kv_tokens / _mean_visible(isl, osl, self.model.window)
        if fitting < 1:
            raise ConfigError(
                f"a request of {isl} + {osl} tokens does not fit beside {self.model.weight_bytes / _GIB:.1f} GiB of "
                f"weights on {self.hardware.name}"
            )
        return fitting if most is None else min(fitting, most)

    def serial(self, isl: int, osl: int, most: float | None = None) -> float:
        """Returns output tokens per second of kernels that run one after another, at most ``most`` requests at once."""
        batch = self.concurrency(isl, osl, most)
        steps = (osl - 1) * self._linears(batch) + osl * self._head(batch)
        return osl / (self._prefill(isl) + steps / batch + self._cache(isl, osl))

    def overlap(self, isl: int, osl: int, most: float | None = None) -> float:
        """Returns output tokens per second if arithmetic and memory traffic overlap perfectly."""
        batch = self.concurrency(isl, osl, most)
        model, bandwidth = self.model, self.hardware.bandwidth
        arithmetic = self._prefill(isl) + (osl - 1) * self._linear_flop_time + osl * self._head_flop_time
        weights = ((osl - 1) * model.linear_bytes + osl * model.head_bytes) / bandwidth / batch
        return osl / max(arithmetic, weights + self._cache(isl, osl))

    def step(self, batch: float, context: float) -> float:
        """Returns the least time of one decode step of ``batch`` requests with ``context`` tokens each."""
        visible = sum(layer.kv_bytes * min(context, layer.window or context) for layer in self.model.layers)
        return self._linears(batch) + self._head(batch) + batch * visible / self.hardware.bandwidth

    @property
    def _linear_flop_time(self) -> float:
        """Of one token's products with the layers' weights."""
        model, hardware = self.model, self.hardware
        slow = model.linear_params - model.linear_fp8_params
        fp8_rate = hardware.fp8_flops or hardware.bf16_flops
        return 2 * slow / hardware.bf16_flops + 2 * model.linear_fp8_params / fp8_rate

    @property
    def _head_flop_time(self) -> float:
        return 2 * self.model.head_params / self.hardware.bf16_flops

    def _prefill(self, isl: int) -> float:
        """Of one prompt: products, then attention; a window leaves a band of the causal half."""
        scores = sum(2 * layer.query_width * _causal_area(isl, layer.window) for layer in self.model.layers)
        return isl * self._linear_flop_time + scores / (PREFILL_ATTENTION_EFFICIENCY * self.hardware.bf16_flops)

    def _linears(self, batch: float) -> float:
        return max(self.model.linear_bytes / self.hardware.bandwidth, batch * self._linear_flop_time)

    def _head(self, batch: float) -> float:
        return max(self.model.head_bytes / self.hardware.bandwidth, batch * self._head_flop_time)

    def _cache(self, isl: int, osl: int) -> float:
        """Of one request: its context read in each decode step, its own keys and values written once."""
        read = sum((osl - 1) * layer.kv_bytes * _mean_visible(isl, osl, layer.window) for layer in self.model.layers)
        return (read + (isl + osl) * self.model.kv_bytes) / self.hardware.bandwidth


def _mean_visible(isl: int, osl: int, window: int | None) -> float:
    """Tokens that a query sees on average while the context grows from ``isl`` to ``isl + osl``."""
    if window is None or window >= isl + osl:
        return isl + osl / 2
    if window <= isl:
        return window
    growing = window - isl  # tokens generated before the window is full
    return (growing * (isl + growing / 2) + (osl - growing) * window) / osl


def _causal_area(isl: int, window: int | None) -> float:
    """Twice the number of (query, key) pairs of a prompt, without the diagonal's half: isl^2, less beyond a window."""
    return isl**2 if window is None or window >= isl else isl**2 - (isl - window) ** 2
