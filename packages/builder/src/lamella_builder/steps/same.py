"""Building a rank in the host's memory with the kernels that another rank's build chose."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lamella_builder.steps.casting import cast
from lamella_builder.steps.kernels import Shape, recorded_choices
from lamella_core import engine
from lamella_core.checkpoint.layout import arrange, matmul_weights
from lamella_core.engine.build_config import BuildConfig
from lamella_core.kernels.matmul import MatmulPlan, default_plan

if TYPE_CHECKING:
    from lamella_core.checkpoint.layout import MatmulWeight
    from lamella_core.engine import Engine, EngineSpec
    from lamella_core.models.base import CausalLM


def build_same(model: CausalLM, build: BuildConfig, like: EngineSpec) -> Engine:
    """Returns the engine of a rank whose weights stay where they are, in the host's memory; nothing is timed.

    It is there to be written: an engine for a GPU runs once it is loaded again. The GPU may be full meanwhile.

    Args:
        model: on the CPU, its weights in the plain layout; must not be used afterwards.
        build: limits.
        like: spec of another rank of the model, built for the device that the engine will run on.
    """
    model = cast(model, build.dtype, lambda done, total: None)
    choices, plans = recorded_choices(like), {}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for held in matmul_weights(model):
        shape = Shape(held.n, held.k, held.weight.dtype, held.is_output_layer)
        plan = choices[shape].plan if shape in choices else _default(held, like.build.device)
        plans[held.name] = plan.to_dict()
        weights[held.name] = arrange(held.weight, plan.layout)
    spec = replace(like, model=model.config, plans=plans, step_seconds={})
    return engine.Engine(spec, {model.config.mapping.rank: weights})


def _default(held: MatmulWeight, device: str) -> MatmulPlan:
    dtype = held.weight.dtype
    return default_plan(dtype, held.n, held.k, batch_invariant=dtype == torch.float32, device=device)
