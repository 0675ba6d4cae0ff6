"""Activation functions under their Hugging Face names.

In float32 an element's result must not depend on where it lies in the tensor: torch's fused silu, sigmoid and tanh-gelu
use another exponential for the last elements of a buffer than for the others, torch.exp, tanh and erf do not. The
functions below are made of those and of exactly rounded arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from lamella_core.errors import ConfigError, nearest_name
from lamella_core.kernels import ops
from lamella_core.kernels.experts import Swiglu
from lamella_core.kernels.fused import SiluGateAfter

Activation = Callable[[torch.Tensor], torch.Tensor]


class GatedActivation(Protocol):
    """Maps [T, 2 I], gate and up side by side, to activation(gate) * up [T, I]."""

    def __call__(self, gate_up: torch.Tensor, out_scale: torch.Tensor | None = None) -> torch.Tensor:
        """With ``out_scale`` [] float32 the result may come as float8, divided by it (see `Linear.input_scale`)."""
        ...


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x)."""
    return (-x.float()).exp_().add_(1.0).reciprocal_().to(x.dtype)


def silu(x: torch.Tensor) -> torch.Tensor:
    """X times its sigmoid."""
    wide = x.float()
    return (wide / (-wide).exp_().add_(1.0)).to(x.dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """X times the normal distribution function of x (Hendrycks and Gimpel 2016), by erf."""
    wide = x.float()
    return ((wide * math.sqrt(0.5)).erf_().add_(1.0).mul_(wide).mul_(0.5)).to(x.dtype)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of `gelu` (same source)."""
    wide = x.float()
    inner = (wide * wide * wide).mul_(0.044715).add_(wide).mul_(math.sqrt(2.0 / math.pi))
    return (inner.tanh_().add_(1.0).mul_(wide * 0.5)).to(x.dtype)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """X times the sigmoid of 1.702 x."""
    wide = x.float()
    return (wide / (wide * -1.702).exp_().add_(1.0)).to(x.dtype)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """The square of max(x, 0) (So et al. 2021)."""
    return torch.relu(x).square_()


_ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": torch.relu,
    "relu2": relu_squared,
    "tanh": torch.tanh,
}


def get_activation(name: str) -> Activation:
    """Returns the function called ``name`` in a Hugging Face config.

    Raises:
        ConfigError: an unknown name.
    """
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        hint = nearest_name(str(name), _ACTIVATIONS)
        raise ConfigError(f"activation (hidden_act) is {name!r}; supported: {known}{hint}")
    return _ACTIVATIONS[name]


def gated(name: str) -> GatedActivation:
    """Returns the gated form of the activation called ``name``; see `get_activation`."""
    activation = get_activation(name)

    def apply(gate_up: torch.Tensor, out_scale: torch.Tensor | None = None) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    return ops.silu_and_mul if activation is silu else apply


class ClampedSwiglu:
    """The gated activation of GPT-OSS (OpenAI 2025): gate * sigmoid(alpha * gate) * (up + 1), both limited before.

    Args:
        alpha: steepness of the sigmoid.
        limit: the gate becomes at most this, up stays within +- it.
    """

    def __init__(self, alpha: float, limit: float) -> None:
        self.alpha, self.limit = alpha, limit

    def __call__(self, gate_up: torch.Tensor, out_scale: torch.Tensor | None = None) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (gate / (gate * -self.alpha).exp_().add_(1.0) * (up + 1.0)).to(gate_up.dtype)


def swiglu_of(activation: Activation) -> Swiglu | None:
    """Returns an activation of gate and up as kernels of experts take it; None if they do not have it."""
    if isinstance(activation, ClampedSwiglu):
        return Swiglu(alpha=activation.alpha, offset=1.0, limit=activation.limit)
    return Swiglu() if activation is ops.silu_and_mul else None


def fusible_gate(activation: GatedActivation, out_scale: torch.Tensor | None) -> SiluGateAfter | None:
    """Returns a gated activation as matmul kernels take it; None if none does."""
    return SiluGateAfter(out_scale) if activation is ops.silu_and_mul else None
