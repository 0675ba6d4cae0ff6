"""build(): model in, Engine out. The function reads as the list of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lamella_builder import steps
from lamella_core import engine
from lamella_core.engine.build_config import BuildConfig
from lamella_core.errors import ConfigError

if TYPE_CHECKING:
    from lamella_core.engine import Engine, EngineSpec
    from lamella_core.models.base import CausalLM


def build(
    model: CausalLM,
    build_config: BuildConfig | None = None,
    *,
    progress: steps.Progress | None = None,
    tokenizer_dir: Path | str | None = None,
    like: EngineSpec | None = None,
) -> Engine:
    """Compiles one rank's model for this machine and the limits it will run with.

    Fusing and sharding happened when the model read its weights. The weights are laid out in place, and moved there one
    by one if they are not on the device that the engine runs on: the engine shares the model's memory, the model stays
    usable and may be built again. Only with a ``build_config.dtype`` that differs
    from the model's do the weights move out of it; the model must not be used afterwards.

    Args:
        model: from `AutoModelForCausalLM`, a model class, or a checkpoint.
        build_config: limits; None takes the defaults.
        progress: called with step name, units done and units in all.
        tokenizer_dir: directory whose tokenizer files `Engine.save` copies into the engine.
        like: spec of another rank of the same model, built before: its kernels are taken over, not timed again.

    Raises:
        ConfigError: limits that the model rules out, a model without weights, or no such device here.
        OutOfMemoryError: the engine cannot be built or run in the memory of this machine or its GPU.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("the model has no weights (they moved into an engine of another dtype): load it again")
    clock, wanted = steps.StepClock(progress), build_config or BuildConfig()
    with clock.step("resolve limits"):
        config = wanted.resolved(model.config)
    with clock.step("plan memory"):
        loaded = model.weight_bytes() if model.device == config.device else 0
        mine = [model.config.mapping.rank]
        steps.plan_memory(model.config, wanted, loaded_bytes=loaded, ranks=mine).check()
    with clock.step("move weights") as advance:
        steps.to_plain(model)
        steps.place(model, config.device, advance)
    with clock.step("cast") as advance:
        model = steps.cast(model, config.dtype, advance)
    with clock.step("choose kernels") as advance:
        known = steps.recorded_choices(like) if like is not None else None
        choices = steps.choose_kernels(model, config, advance, known)
    with clock.step("lay out weights") as advance:
        steps.lay_out(model, choices, advance)
    return engine.Engine.from_model(
        model,
        config,
        tokenizer_dir=tokenizer_dir,
        timings=tuple(choice.to_dict() for choice in choices.values()),
        step_seconds=clock.seconds,
    )
