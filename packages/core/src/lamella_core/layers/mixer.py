"""TokenMixer: the half of a decoder layer in which tokens see each other; attention, or a recurrence with a state."""

from __future__ import annotations

import torch
from torch import nn

from lamella_core.context import ForwardContext, StateSpec
from lamella_core.layers.rotary import Rotation


class TokenMixer(nn.Module):
    """Base of what decoder layers take: [T, H] -> [T, H]."""

    takes_stream = False  # whether `forward` may be given a `Stream` of as many rows as it returns

    @property
    def input_scale(self) -> torch.Tensor | None:
        """Scale with which x may also come as float8, see `Linear.input_scale`; None: only in the model's dtype."""
        return None

    def leave_sum(self) -> bool:
        """Whether from now on this returns its rank's summand, for the next norm to sum; False: it sums, as before."""
        return False

    def forward(
        self, x: torch.Tensor, rotation: Rotation | None, ctx: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns [T, H], or [R, H] of the tokens ``rows`` [R] alone."""
        raise NotImplementedError


class RecurrentMixer(TokenMixer):
    """A mixer that keeps a state of fixed size per sequence; the runtime makes room for ``state_spec``."""

    state_spec: StateSpec
