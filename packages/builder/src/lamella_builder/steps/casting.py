"""Casting a model to the engine's dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lamella_builder.steps.clock import Advance
from lamella_core.config import resolve_dtype
from lamella_core.layers.parameter import set_parameter

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM


def cast(model: CausalLM, dtype: str | None, advance: Advance) -> CausalLM:
    """Returns the model in ``dtype``; the same object when nothing changes.

    Otherwise parameters move one by one into a new model and the old one is left without memory, so that no more than
    one parameter exists twice.
    """
    name = resolve_dtype(dtype, model.config.dtype)
    if name == model.config.dtype:
        return model
    result = type(model).empty(replace(model.config, dtype=name), model.device)
    targets = dict(result.named_parameters())
    for done, (key, parameter) in enumerate(list(model.named_parameters())):
        data = parameter.detach()
        set_parameter(result, key, data.to(targets[key].dtype) if data.is_floating_point() else data)
        set_parameter(model, key, torch.empty(data.shape, dtype=data.dtype, device="meta"))
        advance(done + 1, len(targets))
    return result
