"""The steps of a build, each a function that can be deleted; `lamella_builder.build` is the list of them.

They load when first used: importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lamella_builder.steps.clock import Progress, StepClock

if TYPE_CHECKING:
    from lamella_builder.steps.casting import cast
    from lamella_builder.steps.kernels import choose_kernels, recorded_choices
    from lamella_builder.steps.layout import lay_out, to_plain
    from lamella_builder.steps.memory import MemoryPlan, plan_memory
    from lamella_core.placement import place

__all__ = [
    "MemoryPlan",
    "Progress",
    "StepClock",
    "cast",
    "choose_kernels",
    "lay_out",
    "place",
    "plan_memory",
    "recorded_choices",
    "to_plain",
]

_HOMES = {
    "MemoryPlan": f"{__name__}.memory",
    "cast": f"{__name__}.casting",
    "choose_kernels": f"{__name__}.kernels",
    "lay_out": f"{__name__}.layout",
    "place": "lamella_core.placement",
    "plan_memory": f"{__name__}.memory",
    "recorded_choices": f"{__name__}.kernels",
    "to_plain": f"{__name__}.layout",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
