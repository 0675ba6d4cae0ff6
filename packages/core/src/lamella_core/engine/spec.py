"""EngineSpec: everything about an engine that is not a weight; the content of ``engine.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamella_core import __version__
from lamella_core.checkpoint.formats import ENGINE_FILE
from lamella_core.checkpoint.native import stored_config
from lamella_core.config import ModelConfig
from lamella_core.engine.build_config import BuildConfig
from lamella_core.engine.checksum import json_checksum
from lamella_core.errors import ConfigError, EngineFormatError

SCHEMA_VERSION = 2  # 2: device and gpu; engines of schema 1 run on a CPU
CHECKSUM_KEY = "checksum"  # in engine.json: `json_checksum` of everything else in it


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is.

    Attributes:
        model: configuration, seen from rank 0.
        build: resolved limits.
        plans: parameter name -> `MatmulPlan.to_dict`, how each weight lies and which kernels read it.
        cpu: `cpu_fingerprint` of the machine that chose the plans of an engine for the CPU.
        gpu: `gpu_fingerprint` of the machine that chose the plans of an engine for a GPU.
        timings: one record per matmul shape: n, k, dtype, count, and milliseconds of each candidate at each row count.
        step_seconds: wall time of each build step.
        schema_version: of the file format.
        lamella_version: that built the engine.
    """

    model: ModelConfig
    build: BuildConfig
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cpu: Mapping[str, Any] = field(default_factory=dict)
    gpu: Mapping[str, Any] = field(default_factory=dict)
    timings: tuple[Mapping[str, Any], ...] = ()
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    lamella_version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready fields."""
        return {
            "schema_version": self.schema_version,
            "lamella_version": self.lamella_version,
            "model": self.model.to_dict(),
            "build": self.build.to_dict(),
            "plans": {name: dict(plan) for name, plan in self.plans.items()},
            "cpu": dict(self.cpu),
            "gpu": dict(self.gpu),
            "timings": [dict(record) for record in self.timings],
            "step_seconds": dict(self.step_seconds),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: Path | None = None, rank: int = 0) -> EngineSpec:
        """Inverse of `to_dict`; the model is seen from ``rank``. ``path`` is named in errors.

        What an older schema lacks is filled in, and the result is of the current one.

        Raises:
            EngineFormatError: a newer schema, or a damaged field.
        """
        path = path or Path(ENGINE_FILE)
        check_schema(data, path)
        _, model = stored_config(data.get("model"), rank, path, EngineFormatError)
        try:
            if data["schema_version"] < 2:
                data = {**data, "gpu": {}, "build": {"device": "cpu", **_object(data, "build")}}
            return cls(
                model=model,
                build=BuildConfig.from_dict(_object(data, "build")),
                plans={str(name): dict(plan) for name, plan in _object(data, "plans").items()},
                cpu=_object(data, "cpu"),
                gpu=_object(data, "gpu"),
                timings=tuple(dict(record) for record in data["timings"]),
                step_seconds={str(k): float(v) for k, v in _object(data, "step_seconds").items()},
                lamella_version=str(data["lamella_version"]),
            )
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineFormatError(f"{path} is damaged: {error}; build or copy the engine again") from error


def _object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data[key]
    if not isinstance(value, dict):
        raise TypeError(f"{key} is a {type(value).__name__}, not an object")
    return value


def check_content(data: Mapping[str, Any], path: Path) -> None:
    """Refuses an ``engine.json`` whose content is not what was written.

    Raises:
        EngineFormatError: see above.
    """
    content = {key: value for key, value in data.items() if key != CHECKSUM_KEY}
    if data.get(CHECKSUM_KEY) != json_checksum(content):
        raise EngineFormatError(
            f"{path} is damaged or was edited: its checksum differs; copy the engine directory again or build it again"
        )


def check_schema(data: Mapping[str, Any], path: Path) -> None:
    """Refuses an ``engine.json`` that is not ours or newer than this version reads.

    Raises:
        EngineFormatError: see above.
    """
    found = data.get("schema_version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise EngineFormatError(f"{path} is not that of a Lamella engine: schema_version is {found!r}")
    if found > SCHEMA_VERSION:
        writer = data.get("lamella_version", "a newer version")
        raise EngineFormatError(
            f"{path} has schema {found}, written by Lamella {writer}; version {__version__} reads up to schema "
            f"{SCHEMA_VERSION}. Upgrade Lamella, or build the engine again"
        )
