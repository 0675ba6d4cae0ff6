"""BuildJob: from a model directory to an engine directory, one rank after another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lamella_builder.build import build
from lamella_builder.steps import MemoryPlan, Progress, StepClock, plan_memory
from lamella_builder.steps.clock import Advance
from lamella_core.auto import AutoConfig, AutoModelForCausalLM
from lamella_core.checkpoint.formats import detect_format
from lamella_core.checkpoint.loader import load_weights
from lamella_core.checkpoint.native import read_checkpoint_config
from lamella_core.config import ModelConfig
from lamella_core.engine import BuildConfig, EngineWriter
from lamella_core.errors import ConfigError
from lamella_core.hub import resolve_model_dir
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_core.quantization.config import QuantConfig
from lamella_core.quantization.hugging_face import loadable

if TYPE_CHECKING:
    from lamella_core.engine import EngineSpec
    from lamella_core.models.base import CausalLM

LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class BuildRequest:
    """What `lamella-build` was asked for.

    Attributes:
        model: Hugging Face directory or hub id, or a Lamella checkpoint directory.
        output_dir: engine directory to write.
        build_config: limits; its ``dtype`` None takes the model's.
        tp_size: tensor-parallel ranks; None: one, or the checkpoint's.
        pp_size: pipeline stages; None: one, or the checkpoint's.
        load_format: "auto" reads the weights, "dummy" makes random ones from the configuration alone.
        quant_config: how to quantize; None: as the weights are.
    """

    model: str
    output_dir: Path
    build_config: BuildConfig
    tp_size: int | None = None
    pp_size: int | None = None
    load_format: str = "auto"
    quant_config: QuantConfig | None = None


class BuildJob:
    """A build in two parts: a plan made from the configuration alone, then the work.

    Attributes:
        config: the model, from rank 0.
        plan: memory that building and running take.

    Raises:
        CheckpointError: the model directory is missing or damaged.
        ConfigError: options contradict the model or each other.
        UnsupportedModelError: an unknown architecture.
    """

    def __init__(self, request: BuildRequest) -> None:
        if request.load_format not in LOAD_FORMATS:
            raise ConfigError(f"load_format is {request.load_format!r}; allowed: {', '.join(LOAD_FORMATS)}")
        for name in ("tp_size", "pp_size"):
            size = getattr(request, name)
            if size is not None and size < 1:
                raise ConfigError(f"{name} is {size}; it must be at least 1")
        self._request = request
        self._directory = resolve_model_dir(request.model, weights=request.load_format == "auto")
        self._format = detect_format(self._directory)
        self.config = self._read_config()
        self.build_config = request.build_config.resolved(self.config)
        self.plan: MemoryPlan = plan_memory(self.config, request.build_config)

    def _read_config(self) -> ModelConfig:
        request = self._request
        if self._format == "engine":
            raise ConfigError(f"{self._directory} is an engine already; pass the model or checkpoint it was built from")
        if self._format == "checkpoint":
            _, config = read_checkpoint_config(self._directory)
            have = config.mapping
            if (request.tp_size or have.tp_size, request.pp_size or have.pp_size) != (have.tp_size, have.pp_size):
                raise ConfigError(
                    f"{self._directory} was converted for tp_size {have.tp_size} x pp_size {have.pp_size}; build it "
                    "with these, or convert the model again"
                )
            field = config.quantization.contradiction(request.quant_config or QuantConfig(), is_final=True)
            if field is not None:
                raise ConfigError(
                    f"quant_config.{field} differs from that of {self._directory}, "
                    f"{getattr(config.quantization, field)!r}; leave it out, or convert the model again"
                )
            return config
        tp, pp = request.tp_size or 1, request.pp_size or 1
        mapping = Mapping(world_size=tp * pp, tp_size=tp, pp_size=pp)
        dtype = request.build_config.dtype or "auto"
        config = AutoConfig.from_hugging_face(self._directory, dtype, mapping, request.quant_config)
        return config if request.load_format == "dummy" else loadable(config)

    def run(self, progress: Progress | None = None) -> dict[str, float]:
        """Builds and writes the engine, holding one rank's weights at a time; returns the seconds of each step.

        Raises:
            OutOfMemoryError: it does not fit in the memory of this machine or its GPU.
            CheckpointError: weights are missing, damaged or do not fit the configuration; the output cannot be written.
        """
        self.plan.check()
        clock = StepClock(progress)
        spec: EngineSpec | None = None
        with EngineWriter(self._request.output_dir, tokenizer_dir=self._directory) as writer:
            for rank in range(self.config.mapping.world_size):
                with clock.step("read weights") as advance:
                    model = self._model(rank, advance)
                engine = build(model, self._request.build_config, progress=progress, like=spec)
                for name, seconds in engine.spec.step_seconds.items():
                    clock.seconds[name] = clock.seconds.get(name, 0.0) + seconds
                with clock.step("write engine"):
                    writer.add_rank(rank, replace(engine.spec, step_seconds=dict(clock.seconds)), engine.weights(rank))
                spec = spec or engine.spec
                del model, engine
        return clock.seconds

    def _model(self, rank: int, advance: Advance) -> CausalLM:
        """Returns a rank's model with its weights, where the engine will run."""
        device = self.build_config.device
        config = self.config.with_mapping(self.config.mapping.with_rank(rank))
        model_class = get_model_class(config.architecture, config.model_type)
        if self._request.load_format == "dummy":
            return model_class.dummy(config, device)
        if self._format == "checkpoint":
            return AutoModelForCausalLM.from_checkpoint(self._directory, rank, device)
        model = model_class.empty(config, device)
        load_weights(model, self._directory, progress=advance, device=device)
        return model
