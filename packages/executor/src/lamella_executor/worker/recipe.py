"""EngineRecipe: how each rank's process gets the shard that it runs, said in words that fit into JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella_core.errors import ConfigError
from lamella_core.mapping import Mapping as RankMapping

if TYPE_CHECKING:
    from lamella_core.engine import Engine, EngineSpec

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class EngineRecipe:
    """A function that every rank calls in its own process: ``function(rank=r, **arguments) -> Engine``.

    The function returns an engine that holds that rank's weights and was built for ``mapping``. It is imported by name,
    so it lives in an installed package or on the Python path of all ranks, never in the user's script.

    Attributes:
        target: "package.module:function".
        arguments: keyword arguments beside ``rank``: JSON values only.
        mapping: how many ranks there are and what each holds, seen from rank 0.
        device: "cpu", "cuda", or "auto" for the GPU if rank 0's machine has one; resolved here. What the engines that
            the function returns were built for.

    Raises:
        ConfigError: a target of another form, arguments that JSON cannot hold, or no such device.
    """

    target: str
    arguments: Mapping[str, Any]
    mapping: RankMapping
    device: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not _TARGET.fullmatch(self.target):
            raise ConfigError(f"EngineRecipe.target is {self.target!r}; it must be like 'package.module:function'")
        if not isinstance(self.mapping, RankMapping):
            raise ConfigError(f"EngineRecipe.mapping is a {type(self.mapping).__name__}; pass a lamella_core.Mapping")
        if self.device not in _DEVICES:
            raise ConfigError(f"EngineRecipe.device is {self.device!r}; allowed: {', '.join(_DEVICES)}")
        from lamella_core.device import resolve_device  # imports torch

        object.__setattr__(self, "device", resolve_device(self.device))
        object.__setattr__(self, "mapping", self.mapping.with_rank(0))
        object.__setattr__(self, "arguments", json.loads(self._encoded()))  # a copy, the same as other ranks get

    @property
    def world_size(self) -> int:
        return self.mapping.world_size

    def encode_arguments(self) -> bytes:
        """Returns the arguments as JSON."""
        return self._encoded().encode()

    def load(self, rank: int) -> Engine:
        """Calls the function for one rank, in this process.

        Raises:
            ConfigError: there is no such function, or what it returns is not that rank's engine.
        """
        engine = _find(self.target)(rank=rank, **self.arguments)
        self._check(engine, rank)
        return engine

    def _encoded(self) -> str:
        try:
            if not all(isinstance(name, str) and name.isidentifier() and name != "rank" for name in self.arguments):
                raise TypeError("keys must be names of arguments other than 'rank'")
            return json.dumps(dict(self.arguments), allow_nan=False)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"EngineRecipe.arguments cannot be sent to other ranks: {error}; use JSON values"
            ) from error

    def _check(self, engine: Engine, rank: int) -> None:
        built = engine.spec.model.mapping.with_rank(0)
        if built != self.mapping:
            raise ConfigError(f"{self.target} made an engine for {built}, but the recipe's mapping is {self.mapping}")
        if rank not in engine.ranks:
            raise ConfigError(f"{self.target} was asked for rank {rank} and returned ranks {engine.ranks}")
        if engine.device != self.device:
            raise ConfigError(
                f"{self.target} made an engine for {engine.device!r}, but the recipe's device is {self.device!r}"
            )


def load_directory(*, directory: str, rank: int) -> Engine:
    """Opens one rank's file of an engine directory: the target of a directory's recipe."""
    from lamella_core.engine import Engine

    return Engine.load(directory, rank)


def find_recipe(engine: Engine | EngineRecipe | Path | str) -> EngineRecipe | None:
    """Returns how the ranks of an engine get their shards; None if it has one rank.

    Raises:
        EngineFormatError: a directory with a damaged engine.json.
        ConfigError: an engine of several ranks that is in memory only, where other processes cannot reach it.
    """
    from lamella_core.engine import Engine

    if isinstance(engine, EngineRecipe):
        return engine if engine.world_size > 1 else None
    if not isinstance(engine, Engine):
        spec = _read_spec(Path(engine))
        return None if spec is None else _directory_recipe(Path(engine), spec.model.mapping, spec.build.device)
    if engine.world_size == 1:
        return None
    mapping = engine.spec.model.mapping
    if engine.directory is None:
        raise ConfigError(
            f"the engine was built for {engine.world_size} ranks (tp_size {mapping.tp_size} x pp_size "
            f"{mapping.pp_size}) and holds ranks {engine.ranks} in memory, where their processes cannot reach them: "
            "write all ranks to one directory (Engine.save, or lamella-build --output_dir) and pass that, or use LLM("
            f"model, tensor_parallel_size={mapping.tp_size}, pipeline_parallel_size={mapping.pp_size})"
        )
    return _directory_recipe(engine.directory, mapping, engine.device)


def _read_spec(directory: Path) -> EngineSpec | None:
    """Reads what an engine directory says of itself; None if it is no engine, or of one rank."""
    from lamella_core.checkpoint.formats import ENGINE_FILE, read_json_object
    from lamella_core.engine.spec import EngineSpec, check_schema
    from lamella_core.errors import EngineFormatError

    path = directory / ENGINE_FILE
    if not path.is_file():
        return None  # for `Engine.load` to say what is wrong
    data = read_json_object(path, EngineFormatError)
    check_schema(data, path)
    spec = EngineSpec.from_dict(data, path)
    return spec if spec.model.mapping.world_size > 1 else None


def _directory_recipe(directory: Path, mapping: RankMapping, device: str) -> EngineRecipe:
    """Returns the recipe of an engine that was saved for several ranks; every rank must see the directory."""
    return EngineRecipe(f"{__name__}:load_directory", {"directory": str(directory.resolve())}, mapping, device)


def _find(target: str) -> Callable[..., Engine]:
    module, _, name = target.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"EngineRecipe.target {target!r} cannot be imported here: {error}; it must be installed for all ranks"
        ) from error
    if not callable(function):
        raise ConfigError(f"EngineRecipe.target {target!r} is a {type(function).__name__}, not a function")
    return function
