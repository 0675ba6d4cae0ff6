"""BuildJob: from a model directory to an engine directory, one rank after another or several side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella_builder.rank_pool import RankPool
from lamella_builder.rank_source import RankSource
from lamella_builder.sizes import ParallelSizes
from lamella_builder.steps import MemoryPlan, Progress, StepClock, plan_memory
from lamella_builder.steps.memory import format_bytes
from lamella_core.checkpoint.formats import detect_format
from lamella_core.checkpoint.native import read_checkpoint_config
from lamella_core.checks import check_integer
from lamella_core.config import ModelConfig
from lamella_core.engine import BuildConfig, EngineWriter
from lamella_core.errors import ConfigError, OutOfMemoryError
from lamella_core.hub import resolve_model_dir
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_core.quantization.config import QuantConfig

if TYPE_CHECKING:
    from lamella_builder.auto_parallel import Choice
    from lamella_core.engine import EngineSpec

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class BuildRequest:
    """What `lamella-build` was asked for.

    Attributes:
        model: Hugging Face directory or hub id, or a Lamella checkpoint directory.
        output_dir: engine directory to write.
        build_config: limits; its ``dtype`` None takes the model's.
        sizes: ranks; what is not said is one, or the checkpoint's.
        workers: ranks that are built at once, each in a process of its own; 1: one after another in this one.
        load_format: "auto" reads the weights, "dummy" makes random ones from the configuration alone.
        quant_config: how to quantize; None: as the weights are.
    """

    model: str
    output_dir: Path
    build_config: BuildConfig
    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    workers: int = 1
    load_format: str = "auto"
    quant_config: QuantConfig | None = None


class BuildJob:
    """A build in two parts: a plan made from the configuration alone, then the work.

    Attributes:
        config: the model, from rank 0.
        choice: how auto_parallel came to the sizes; None without it.
        plan: memory that building and running take.

    Raises:
        CheckpointError: the model directory is missing or damaged.
        ConfigError: options contradict the model or each other.
        OutOfMemoryError: auto_parallel finds no sizes that fit.
        UnsupportedModelError: an unknown architecture.
    """

    def __init__(self, request: BuildRequest) -> None:
        if request.load_format not in LOAD_FORMATS:
            raise ConfigError(f"load_format is {request.load_format!r}; allowed: {', '.join(LOAD_FORMATS)}")
        check_integer("workers", request.workers, 1)
        self._request = request
        self._directory = resolve_model_dir(request.model, weights=request.load_format == "auto")
        self._format = detect_format(self._directory)
        self.choice: Choice | None = None
        self.config = self._read_config()
        _check_task(self.config)
        self.build_config = request.build_config.resolved(self.config)
        self.plan: MemoryPlan = plan_memory(self.config, request.build_config)

    def _read_config(self) -> ModelConfig:
        request = self._request
        if self._format == "engine":
            raise ConfigError(f"{self._directory} is an engine already; pass the model or checkpoint it was built from")
        if self._format == "checkpoint":
            return checkpoint_config(self._directory, request.sizes, request.quant_config)
        config, self.choice = request.sizes.resolve(lambda m: self._source(m).config(), request.build_config)
        return config

    def _source(self, mapping: Mapping) -> RankSource:
        request = self._request
        dtype = request.build_config.dtype or "auto"
        return RankSource(
            self._directory, self._format, request.build_config, mapping, dtype, request.quant_config,
            request.load_format,
        )  # fmt: skip

    def run(self, progress: Progress | None = None) -> dict[str, float]:
        """Builds and writes the engine; returns the seconds of each step.

        Without workers this process holds one rank's weights at a time. With them, kernels that are timed are timed by
        the first rank of the first and of the last stage, before the other ranks begin.

        Raises:
            OutOfMemoryError: it does not fit in the memory of this machine or its GPU.
            CheckpointError: weights are missing, damaged or do not fit the configuration; the output cannot be written.
            WorkerError: the process that built a rank died.
        """
        self.plan.check()
        mapping = self.config.mapping
        source = replace(
            self._source(mapping), build_config=replace(self._request.build_config, device=self.build_config.device)
        )
        workers = min(self._request.workers, mapping.world_size)
        clock = StepClock(progress)
        with EngineWriter(self._request.output_dir, tokenizer_dir=self._directory) as writer:
            if workers == 1:
                _one_after_another(source, writer, clock)
            else:
                self._check_workers(workers)
                self._side_by_side(source, writer, clock, workers)
        return clock.seconds

    def _check_workers(self, workers: int) -> None:
        """Refuses more processes than memory holds."""
        on_each = -(-workers // (_num_gpus() or 1)) if self.plan.device == "cuda" else workers
        needed, free = on_each * self.plan.build_bytes, self.plan.available_bytes
        if needed > free:
            raise OutOfMemoryError(
                f"building {on_each} ranks at once takes {format_bytes(needed)}, {format_bytes(free)} are free; lower "
                f"workers to {workers // on_each * max(1, free // self.plan.build_bytes)}"
            )

    def _side_by_side(self, source: RankSource, writer: EngineWriter, clock: StepClock, workers: int) -> None:
        mapping = self.config.mapping
        num_gpus = _num_gpus() if self.plan.device == "cuda" else 0
        timed = self.build_config.kernel_selection == "timed"
        leaders = sorted({0, mapping.world_size - mapping.tp_size}) if timed else []
        like: EngineSpec | None = None
        with RankPool(source, writer.work_dir, workers, clock.progress, num_gpus) as pool:
            for rank in leaders:
                with clock.step(f"build rank {rank}"):
                    ((spec, entry),) = pool.build([rank], like)
                writer.adopt_rank(rank, spec, entry)
                like = with_choices(like, spec)
            others = [rank for rank in range(mapping.world_size) if rank not in leaders]
            if not others:
                return
            with clock.step(f"build {len(others)} ranks"):
                built = pool.build(others, like)
            for rank, (spec, entry) in zip(others, built, strict=True):
                writer.adopt_rank(rank, spec, entry)


def _check_task(config: ModelConfig) -> None:
    """Refuses an engine that nothing could run."""
    sizes = config.mapping
    if sizes.world_size > 1 and get_model_class(config.architecture, config.model_type).task == "score":
        raise ConfigError(
            f"tp_size {sizes.tp_size} x pp_size {sizes.pp_size} = {sizes.world_size} ranks, but {config.architecture} "
            "scores texts, which runs on one: leave them out"
        )


def _one_after_another(source: RankSource, writer: EngineWriter, clock: StepClock) -> None:
    like: EngineSpec | None = None
    for rank in range(source.mapping.world_size):
        engine = source.engine(rank, clock, like=like)
        with clock.step("write engine"):
            writer.add_rank(rank, replace(engine.spec, step_seconds=dict(clock.seconds)), engine.weights(rank))
        like = with_choices(like, engine.spec)
        del engine


def with_choices(like: EngineSpec | None, spec: EngineSpec) -> EngineSpec:
    """Returns a spec that knows the kernels of both; those of the earlier one count."""
    if like is None:
        return replace(spec, plans={}, step_seconds={})
    known = {_shape_of(record) for record in like.timings}
    return replace(like, timings=like.timings + tuple(r for r in spec.timings if _shape_of(r) not in known))


def _shape_of(record: MappingABC[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("n", "k", "dtype", "is_output_layer"))


def checkpoint_config(directory: Path, sizes: ParallelSizes, quant_config: QuantConfig | None) -> ModelConfig:
    """Returns the configuration of a Lamella checkpoint, from rank 0.

    Raises:
        ConfigError: the sizes or the quantization asked for are not those it was converted with.
    """
    _, config = read_checkpoint_config(directory)
    sizes.check_same(config.mapping, f"the checkpoint {directory}", "convert the model again with these sizes")
    field_name = config.quantization.contradiction(quant_config or QuantConfig(), is_final=True)
    if field_name is not None:
        raise ConfigError(
            f"quant_config.{field_name} differs from that of {directory}, "
            f"{getattr(config.quantization, field_name)!r}; leave it out, or convert the model again"
        )
    return config


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
