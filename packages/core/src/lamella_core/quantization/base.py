"""LinearMethod: how a linear layer stores its weights and multiplies by them; one class per quantization scheme."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import torch

from lamella_core.errors import ConfigError
from lamella_core.quantization.config import QuantAlgo
from lamella_core.quantization.modules import is_excluded

if TYPE_CHECKING:
    from lamella_core.config import ModelConfig
    from lamella_core.kernels.experts import ExpertProjection
    from lamella_core.kernels.fused import FusedStep
    from lamella_core.layers.linear import Linear

# Where each scheme's LinearMethod lives; imported when a model asks for it.
_METHODS: dict[QuantAlgo | None, tuple[str, str]] = {
    None: ("lamella_core.quantization.unquantized", "Unquantized"),
    QuantAlgo.FP8: ("lamella_core.quantization.fp8", "Fp8PerTensor"),
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: ("lamella_core.quantization.fp8", "Fp8PerChannel"),
}


class LinearMethod(Protocol):
    """What a linear layer delegates to. Stateless between layers; a layer's tensors and plan live on the layer."""

    def create_weights(self, layer: Linear) -> None:
        """Gives ``layer`` its parameters (empty, each a `Parameter` with its shard) and what `apply` needs."""
        ...

    def input_scale(self, layer: Linear) -> torch.Tensor | None:
        """Returns the layer's static input scale [] float32, by which whoever makes its input may quantize it; or None.

        An offer: `apply` takes float8 inputs quantized so, and quantizes inputs in the model's dtype itself.
        """
        ...

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, expert: int | None = None
    ) -> torch.Tensor:
        """Returns x [T, in on this rank] times the weight, plus bias: [T, out on this rank] in x's dtype.

        ``expert`` selects the weight of a layer that stacks several: an index among those of this rank.
        """
        ...

    def apply_fused(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, after: FusedStep
    ) -> torch.Tensor | None:
        """Like `apply`, with what follows in the same kernel; None where that is not faster or not possible."""
        ...

    def stacked(self, layer: Linear, bias: torch.Tensor | None) -> ExpertProjection:
        """Returns a layer that stacks several experts as grouped products take it, with bias [experts, out] if any."""
        ...


def linear_method(config: ModelConfig, name: str) -> LinearMethod:
    """Returns the method for the linear called ``name`` (dotted path in the model).

    Raises:
        ConfigError: the configured scheme has no implementation, or leaves out a part of a fused projection.
    """
    quantization = config.quantization
    algo = quantization.quant_algo
    if algo is not None and is_excluded(config, name):
        algo = None
    if algo not in _METHODS:
        known = ", ".join(a.value if a else "none" for a in _METHODS)
        raise ConfigError(f"quant_algo {algo.value if algo else None} cannot run yet; available: {known}")
    module, attribute = _METHODS[algo]
    return getattr(import_module(module), attribute)(quantization)
