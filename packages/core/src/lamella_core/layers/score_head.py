"""Output layers of models that score a text instead of continuing it: [R, H] -> [R, labels] float32.

They are small and never quantized; every rank holds them whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lamella_core.config import ModelConfig
from lamella_core.context import ForwardContext
from lamella_core.layers.activation import get_activation
from lamella_core.layers.linear import ReplicatedLinear
from lamella_core.quantization.config import QuantConfig


class ScoreHead(nn.Module):
    """One linear layer, or two with an activation between them.

    Args:
        config: of the model.
        num_labels: scores per row.
        activation: Hugging Face name of the function after a first layer [H, H]; None: there is no first layer.
        bias: of the last layer; the first has one.
    """

    def __init__(self, config: ModelConfig, num_labels: int, *, activation: str | None = None, bias: bool) -> None:
        super().__init__()
        plain, hidden = replace(config, quantization=QuantConfig()), config.hidden_size
        self.dense: ReplicatedLinear | None = None
        self.activation = None if activation is None else get_activation(activation)
        if activation is not None:
            self.dense = ReplicatedLinear(hidden, hidden, True, config=plain, name="lm_head.dense")
        self.out = ReplicatedLinear(hidden, num_labels, bias, config=plain, name="lm_head.out")

    def forward(self, hidden: torch.Tensor, ctx: ForwardContext, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if self.dense is not None and self.activation is not None:
            hidden = self.activation(self.dense(hidden, ctx))
        return self.out(hidden, ctx).to(dtype)
