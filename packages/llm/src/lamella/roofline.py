"""The speed that a GPU's memory bandwidth and arithmetic rate allow a model, by calculation alone.

A request of I prompt and O generated tokens that runs among B others costs, in seconds of the GPU:

* prefill: 2 FLOP per weight of the layers and prompt token, and 2 x (query heads x head size) x I^2 per layer for the
  causal half of the attention, at `PREFILL_ATTENTION_EFFICIENCY` of the bfloat16 rate;
* linears: each decode step reads every weight once for B tokens, or is bound by their FLOPs if those take longer;
* experts, likewise layer by layer: a token computes with top_k of them, and a decode step reads those that B tokens are
  expected to meet by uniformly random routing (`LayerExperts.hit`);
* KV cache: each decode step reads the keys and values of the context so far; every token's are written once.

Serial bound: these after one another, which a stream of separate kernels can reach. Overlap bound: all FLOPs beside all
bytes, a ceiling for anything. B follows from the memory: as many requests as fit at half their output.
N GPUs count as one of N times the memory, bandwidth and arithmetic rate, whose links take no time.
(Williams, Waterman and Patterson 2009 for the model of bandwidth and arithmetic bounds.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lamella.model_shape import LayerAttention, LayerExperts, ModelShape
from lamella_core.errors import ConfigError
from lamella_core.hardware import KNOWN_HARDWARE, Hardware, find_hardware

__all__ = ["KNOWN_HARDWARE", "Hardware", "LayerAttention", "LayerExperts", "ModelShape", "Roofline", "find_hardware"]

PREFILL_ATTENTION_EFFICIENCY = 0.75  # of the bfloat16 rate; what the fastest causal kernels reach
WORKSPACE_BYTES = 2.5 * (1 << 30)  # activations, graphs and workspaces of a serving process, one per GPU

_GIB = 1 << 30


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
        fitting = self.kv_tokens / LayerAttention(0, 0, self.model.window).mean_visible(isl, osl)
        if fitting < 1:
            raise ConfigError(
                f"a request of {isl} + {osl} tokens does not fit beside {self.model.weight_bytes / _GIB:.1f} GiB of "
                f"weights on {self.hardware.name}"
            )
        return fitting if most is None else min(fitting, most)

    def serial(self, isl: int, osl: int, most: float | None = None) -> float:
        """Returns output tokens per second of kernels that run one after another, at most ``most`` requests at once."""
        batch = self.concurrency(isl, osl, most)
        steps = (osl - 1) * (self._linears(batch) + self._experts(batch)) + osl * self._head(batch)
        return osl / (self._prefill(isl) + steps / batch + self._cache(isl, osl))

    def overlap(self, isl: int, osl: int, most: float | None = None) -> float:
        """Returns output tokens per second if arithmetic and memory traffic overlap perfectly."""
        batch = self.concurrency(isl, osl, most)
        model, bandwidth = self.model, self.hardware.bandwidth
        arithmetic = self._prefill(isl) + (osl - 1) * self._token_flop_time + osl * self._head_flop_time
        step_bytes = model.linear_bytes + sum(layer.hit(batch) * layer.num_bytes for layer in model.experts)
        weights = ((osl - 1) * step_bytes + osl * model.head_bytes) / bandwidth / batch
        return osl / max(arithmetic, weights + self._cache(isl, osl))

    def step(self, batch: float, context: float) -> float:
        """Returns the least time of one decode step of ``batch`` requests with ``context`` tokens each."""
        visible = sum(layer.kv_bytes * layer.visible(context) for layer in self.model.layers)
        weights = self._linears(batch) + self._experts(batch) + self._head(batch)
        return weights + batch * visible / self.hardware.bandwidth

    def _flop_time(self, params: int, fp8_params: int) -> float:
        """Of one token's products with matrices of so many numbers, some of them float8."""
        fp8_rate = self.hardware.fp8_flops or self.hardware.bf16_flops
        return 2 * (params - fp8_params) / self.hardware.bf16_flops + 2 * fp8_params / fp8_rate

    @property
    def _linear_flop_time(self) -> float:
        """Of one token's products with the weights that every token meets."""
        return self._flop_time(self.model.linear_params, self.model.linear_fp8_params)

    def _expert_flop_time(self, layer: LayerExperts) -> float:
        """Of one token's products with its experts of a layer."""
        return layer.top_k * self._flop_time(layer.params, layer.fp8_params)

    @property
    def _token_flop_time(self) -> float:
        """Of one token's products in all layers."""
        return self._linear_flop_time + sum(map(self._expert_flop_time, self.model.experts))

    @property
    def _head_flop_time(self) -> float:
        return 2 * self.model.head_params / self.hardware.bf16_flops

    def _prefill(self, isl: int) -> float:
        """Of one prompt: products, then attention; a window leaves a band of the causal half."""
        scores = sum(2 * layer.query_width * layer.causal_area(isl) for layer in self.model.layers)
        return isl * self._token_flop_time + scores / (PREFILL_ATTENTION_EFFICIENCY * self.hardware.bf16_flops)

    def _linears(self, batch: float) -> float:
        return max(self.model.linear_bytes / self.hardware.bandwidth, batch * self._linear_flop_time)

    def _experts(self, batch: float) -> float:
        return sum(
            max(layer.hit(batch) * layer.num_bytes / self.hardware.bandwidth, batch * self._expert_flop_time(layer))
            for layer in self.model.experts
        )

    def _head(self, batch: float) -> float:
        return max(self.model.head_bytes / self.hardware.bandwidth, batch * self._head_flop_time)

    def _cache(self, isl: int, osl: int) -> float:
        """Of one request: its context read in each decode step, its own keys and values written once."""
        read = sum((osl - 1) * layer.kv_bytes * layer.mean_visible(isl, osl) for layer in self.model.layers)
        return (read + (isl + osl) * self.model.kv_bytes) / self.hardware.bandwidth
