"""Moving a model's weights to a device, one at a time, and giving them kernels that run there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lamella_core import device as devices
from lamella_core.checkpoint.layout import PLAIN_LAYOUT, MatmulWeight, matmul_weights, restore
from lamella_core.errors import OutOfMemoryError
from lamella_core.kernels.matmul import default_plan
from lamella_core.layers.parameter import set_parameter

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM

_GIB = 1 << 30


def place(model: CausalLM, device: str, advance: Callable[[int, int], None] | None = None) -> None:
    """Moves the weights to "cpu" or "cuda", in place; those that are there stay where they are.

    No more than one weight exists twice, if nobody else holds the old ones. Weights get the default kernels if theirs
    do not run there.

    Args:
        model: with weights, in any layout.
        device: "cpu" or "cuda".
        advance: told of each weight: done, in all.

    Raises:
        OutOfMemoryError: the GPU has no room for the weights.
    """
    check_room(model, device)
    layouts = {held.name: held for held in matmul_weights(model)}
    parameters = list(model.named_parameters())
    for done, (name, parameter) in enumerate(parameters):
        if parameter.device.type != device:
            data, held = parameter.detach(), layouts.get(name)
            if held is None or held.plan.device == device:
                set_parameter(model, name, data.to(device))
            else:
                set_parameter(model, name, _plain(held, data).to(device))
                _set_default_plan(held, device)
        if advance is not None:
            advance(done + 1, len(parameters))


def replan(model: CausalLM) -> None:
    """Gives weights whose kernels are those of another device than theirs the default ones, and the plain layout."""
    for held in matmul_weights(model):
        weight = held.weight
        if weight.is_meta or held.plan.device == weight.device.type:
            continue
        if held.plan.layout != PLAIN_LAYOUT:
            set_parameter(model, held.name, _plain(held, weight.cpu()).to(weight.device))
        _set_default_plan(held, weight.device.type)


def check_room(model: CausalLM, device: str) -> None:
    """Refuses to put more weights on a GPU than it has room for.

    Args:
        model: its parameters may have no memory yet.
        device: "cpu" (nothing is checked) or "cuda".

    Raises:
        OutOfMemoryError: see above.
    """
    if device == "cpu":
        return
    needed = sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type != device)
    free, total = devices.free_gpu_bytes()
    if needed > free:
        raise OutOfMemoryError(
            f"the weights take {needed / _GIB:.2f} GiB, the GPU has {free / _GIB:.2f} GiB free of {total / _GIB:.2f}; "
            "choose a smaller dtype or float8 weights, end other processes on the GPU, or use device='cpu'"
        )


def _plain(held: MatmulWeight, weight: torch.Tensor) -> torch.Tensor:
    if held.plan.layout == PLAIN_LAYOUT:
        return weight
    return restore(weight, held.plan.layout, held.n, stacked=held.is_stacked)


def _set_default_plan(held: MatmulWeight, device: str) -> None:
    dtype = held.weight.dtype
    strict = dtype == torch.float32
    held.module.plan = default_plan(dtype, held.n, held.k, batch_invariant=strict, layout=PLAIN_LAYOUT, device=device)
