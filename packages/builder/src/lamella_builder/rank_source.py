"""RankSource: where the ranks of a model come from, in words that fit into JSON, and one rank's way to an engine."""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella_builder.build import build
from lamella_builder.steps import StepClock
from lamella_builder.steps.clock import Advance
from lamella_builder.steps.same import build_same
from lamella_core.auto import AutoConfig, AutoModelForCausalLM
from lamella_core.checkpoint.loader import load_weights
from lamella_core.checkpoint.native import read_checkpoint_config
from lamella_core.engine import BuildConfig
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_core.placement import check_room
from lamella_core.quantization.config import QuantConfig
from lamella_core.quantization.hugging_face import loadable

if TYPE_CHECKING:
    from lamella_core.config import ModelConfig
    from lamella_core.engine import Engine, EngineSpec
    from lamella_core.models.base import CausalLM


@dataclass(frozen=True)
class RankSource:
    """All that a process needs to build any rank.

    Attributes:
        directory: Hugging Face directory or Lamella checkpoint; every rank must see it.
        kind: "hugging_face" or "checkpoint".
        build_config: limits; its device is resolved.
        mapping: the ranks, from any of them.
        dtype: to read weights in; "auto" is what the directory says. Not of a checkpoint.
        quant_config: how to quantize; None: as the weights are. Not of a checkpoint.
        load_format: "auto" reads the weights, "dummy" makes random ones.
    """

    directory: Path
    kind: str
    build_config: BuildConfig
    mapping: Mapping
    dtype: str = "auto"
    quant_config: QuantConfig | None = None
    load_format: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready fields."""
        return {
            "directory": str(self.directory.resolve()),
            "kind": self.kind,
            "build_config": self.build_config.to_dict(),
            "mapping": self.mapping.to_dict(with_rank=False),
            "dtype": self.dtype,
            "quant_config": None if self.quant_config is None else self.quant_config.to_dict(),
            "load_format": self.load_format,
        }

    @classmethod
    def from_dict(cls, fields: MappingABC[str, Any]) -> RankSource:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: an unknown field or a value out of range.
        """
        quant = fields["quant_config"]
        return cls(
            Path(fields["directory"]),
            fields["kind"],
            BuildConfig.from_dict(fields["build_config"]),
            Mapping.from_dict(fields["mapping"]),
            fields["dtype"],
            None if quant is None else QuantConfig.from_dict(quant),
            fields["load_format"],
        )

    def config(self, rank: int = 0) -> ModelConfig:
        """Returns the model's configuration as ``rank`` sees it, and as its weights are read.

        Raises:
            CheckpointError: the directory is damaged.
            ConfigError: it rules the mapping, dtype or quantization out.
        """
        if self.kind == "checkpoint":
            return read_checkpoint_config(self.directory, rank)[1]
        config = AutoConfig.from_hugging_face(
            self.directory, self.dtype, self.mapping.with_rank(rank), self.quant_config
        )
        return config if self.load_format == "dummy" else loadable(config)

    def engine(self, rank: int, clock: StepClock | None = None, *, like: EngineSpec | None = None) -> Engine:
        """Reads and builds one rank, where the engine runs.

        Args:
            rank: which one.
            clock: gets the seconds of each step, and reports progress.
            like: spec of another rank; its kernels are taken over.

        Raises:
            CheckpointError, ConfigError, OutOfMemoryError: see `AutoModelForCausalLM` and `build`.
        """
        clock = clock or StepClock()
        with clock.step("read weights") as advance:
            model = self._model(rank, advance, self.build_config.device)
        engine = build(model, self.build_config, progress=clock.progress, like=like, tokenizer_dir=self.directory)
        for name, seconds in engine.spec.step_seconds.items():
            clock.seconds[name] = clock.seconds.get(name, 0.0) + seconds
        return engine

    def engine_like(self, rank: int, like: EngineSpec) -> Engine:
        """Reads one rank into the host's memory, as `engine` would build it; see `build_same`."""
        return build_same(self._model(rank, lambda done, total: None, "cpu"), self.build_config, like)

    def _model(self, rank: int, advance: Advance, device: str) -> CausalLM:
        """Returns a rank's model with its weights."""
        if self.kind == "checkpoint":
            return AutoModelForCausalLM.from_checkpoint(self.directory, rank, device)
        config = self.config(rank)
        model_class = get_model_class(config.architecture, config.model_type)
        if self.load_format == "dummy":
            return model_class.dummy(config, device)
        model = model_class.empty(config, device)
        check_room(model, device)
        load_weights(model, self.directory, progress=advance, device=device)
        return model
