"""Experts without a gate, which may work on fewer numbers than the hidden state has (Nemotron 3, NVIDIA 2025)."""

from __future__ import annotations

from dataclasses import replace

import torch

from lamella_core.config import ModelConfig
from lamella_core.layers.activation import get_activation
from lamella_core.layers.linear import ReplicatedLinear
from lamella_core.layers.moe import GatedExperts


class PlainExperts(GatedExperts):
    """down(activation(up(x))) of this rank's experts; ``gate_up_proj`` is up alone.

    Args:
        config: of the whole model.
        num_experts: of the whole model.
        inner: inner size of one expert.
        name: dotted path of this module.
        latent: what experts read and return, made from the hidden state and turned into it by a product each, which
            all experts share; None: the hidden state itself.
        latent_bias: whether these products have a bias.
    """

    parts = ("up",)

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        inner: int,
        *,
        name: str,
        latent: int | None = None,
        latent_bias: bool = False,
    ) -> None:
        narrow = config if latent is None else replace(config, hidden_size=latent)
        super().__init__(narrow, num_experts, inner, name=name, activation=get_activation(config.hidden_act))
        self.to_latent: ReplicatedLinear | None = None
        self.from_latent: ReplicatedLinear | None = None
        if latent is not None:
            hidden = config.hidden_size
            self.to_latent = ReplicatedLinear(hidden, latent, latent_bias, config=config, name=f"{name}.to_latent")
            self.from_latent = ReplicatedLinear(latent, hidden, latent_bias, config=config, name=f"{name}.from_latent")
        self.adds_latent_bias = config.mapping.tp_rank == 0

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.to_latent is None or self.from_latent is None:
            return super().forward(x, experts, weights)
        latent = self.to_latent.method.apply(self.to_latent, x, self.to_latent.bias)
        out = super().forward(latent, experts, weights)
        bias = self.from_latent.bias if self.adds_latent_bias else None  # ranks sum their parts
        return self.from_latent.method.apply(self.from_latent, out, bias)
