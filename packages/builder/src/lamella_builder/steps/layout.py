"""Laying weights out for the kernels that were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lamella_builder.steps.clock import Advance
from lamella_builder.steps.kernels import Choice, Shape
from lamella_core.checkpoint.layout import PLAIN_LAYOUT, arrange, matmul_weights, restore
from lamella_core.kernels.matmul import default_plan
from lamella_core.layers.parameter import set_parameter

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM


def lay_out(model: CausalLM, choices: Mapping[Shape, Choice], advance: Advance) -> None:
    """Gives every matmul weight its plan and the plan's layout, in place, one at a time; the model still runs.

    Args:
        model: its weights in the plain layout.
        choices: what `choose_kernels` returned for it.
        advance: told of each weight.
    """
    weights = matmul_weights(model)
    for done, held in enumerate(weights):
        plan = choices[Shape(held.n, held.k, held.weight.dtype, held.is_output_layer)].plan
        if plan.layout != PLAIN_LAYOUT:
            set_parameter(model, held.name, arrange(held.weight, plan.layout))
        held.module.plan = plan
        advance(done + 1, len(weights))


def to_plain(model: CausalLM) -> None:
    """Brings weights that an earlier build laid out back to the plain layout, with the default plan."""
    for held in matmul_weights(model):
        if held.plan.layout != PLAIN_LAYOUT:
            plain = restore(held.weight, held.plan.layout, held.n, stacked=held.is_stacked)
            set_parameter(model, held.name, plain)
            strict = plain.dtype == torch.float32
            held.module.plan = default_plan(
                plain.dtype, held.n, held.k, batch_invariant=strict, layout=PLAIN_LAYOUT, device=plain.device.type
            )
