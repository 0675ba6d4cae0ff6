"""A model of several ranks: how each rank's process gets its engine, and how all of them are written."""

from __future__ import annotations

import os
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lamella.progress import shown_progress
from lamella_builder.job import with_choices
from lamella_builder.rank_source import RankSource
from lamella_builder.steps import StepClock
from lamella_core.config import ModelConfig
from lamella_core.engine import Engine, EngineSpec, EngineWriter
from lamella_core.engine.writer import has_tokenizer
from lamella_core.errors import ConfigError
from lamella_core.models.registry import get_model_class
from lamella_executor.worker.launchers import AGENT_VARIABLE
from lamella_executor.worker.recipe import EngineRecipe, find_recipe

_BUILD_RANK = "lamella.ranks:build_rank"


@dataclass(frozen=True)
class RankRecipe(EngineRecipe):
    """An `EngineRecipe` that keeps what it loads in this process, which is rank 0's engine.

    Attributes:
        source: where ranks are built from; None: they are loaded from an engine directory.
        shows_progress: whether a bar shows the steps of this process's build.
    """

    source: RankSource | None = None
    shows_progress: bool = False
    _kept: dict[int, Engine] = field(default_factory=dict, compare=False, repr=False)

    def load(self, rank: int) -> Engine:
        """Returns a rank's engine, the same at each call; see `EngineRecipe.load`."""
        if rank not in self._kept:
            self._kept[rank] = super().load(rank) if self.source is None else self._build(self.source, rank)
        return self._kept[rank]

    def _build(self, source: RankSource, rank: int) -> Engine:
        like = self.arguments["like"]
        with shown_progress(self.shows_progress) as progress:
            return source.engine(rank, StepClock(progress), like=None if like is None else EngineSpec.from_dict(like))

    @property
    def engine(self) -> Engine:
        """Rank 0's engine."""
        return self.load(0)

    @property
    def tokenizer_dir(self) -> Path | None:
        """Directory with the model's tokenizer, if it has one."""
        directory = self.source.directory if self.source is not None else Path(self.arguments["directory"])
        return directory if has_tokenizer(directory) else None

    def write_ranks(self, writer: EngineWriter) -> None:
        """Writes every rank, reading again one after another those that other processes run.

        Ranks of an engine for GPUs are read into the host's memory: the GPUs are in use.
        """
        like = with_choices(None, self.engine.spec)
        writer.add_rank(0, self.engine.spec, self.engine.weights(0))
        for rank in range(1, self.world_size):
            engine = super().load(rank) if self.source is None else self.source.engine_like(rank, like)
            writer.add_rank(rank, engine.spec, engine.weights(rank))
            del engine


def engine_recipe(engine: Engine | Path) -> RankRecipe | None:
    """Returns how the ranks of an engine or its directory are opened; None if it has one rank.

    Raises:
        ConfigError: an engine of several ranks that is in memory only.
    """
    found = find_recipe(engine)
    return None if found is None else RankRecipe(found.target, found.arguments, found.mapping, found.device)


def source_recipe(source: RankSource, *, shows_progress: bool = False) -> RankRecipe:
    """Returns how each rank of a model is read and built in its own process.

    All ranks must multiply alike what they all hold, such as the routers of experts. So where kernels are timed, rank 0
    is built at once, and the others take its choices over.
    """
    recipe = RankRecipe(
        _BUILD_RANK, {"source": source.to_dict(), "like": None}, source.mapping, source.build_config.device, source,
        shows_progress,
    )  # fmt: skip
    if source.build_config.kernel_selection != "timed":
        return recipe
    like = with_choices(None, recipe.engine.spec)
    return replace(recipe, arguments={**recipe.arguments, "like": like.to_dict()})


def build_rank(*, rank: int, source: MappingABC[str, Any], like: MappingABC[str, Any] | None) -> Engine:
    """Reads and builds one rank: what the processes of other ranks call by its name in `source_recipe`.

    Args:
        rank: which one.
        source: `RankSource.to_dict`.
        like: `EngineSpec.to_dict` of a rank whose kernels are taken over.
    """
    return RankSource.from_dict(source).engine(rank, like=None if like is None else EngineSpec.from_dict(like))


def check_ranks(config: ModelConfig, device: str) -> None:
    """Refuses more ranks than this machine's GPUs can run, before anything is loaded.

    Args:
        config: the model, from rank 0.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: see above, or a model that scores texts, which runs on one rank.
    """
    mapping = config.mapping
    sizes = f"tensor_parallel_size {mapping.tp_size} x pipeline_parallel_size {mapping.pp_size} = {mapping.world_size}"
    if get_model_class(config.architecture, config.model_type).task == "score":
        raise ConfigError(f"{sizes} ranks, but {config.architecture} scores texts, which runs on one: leave them out")
    if device == "cpu" or AGENT_VARIABLE in os.environ:
        return
    available = torch.cuda.device_count()
    if mapping.world_size > available:
        raise ConfigError(
            f"{sizes} ranks need as many GPUs, and this machine has {available}; lower a size, start on several "
            "machines with `mpirun -n RANKS lamella-launch python script.py`, or use device='cpu'"
        )
