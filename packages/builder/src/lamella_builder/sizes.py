"""ParallelSizes: how many ranks a user asks for, checked, and what comes of it for a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lamella_core.checks import check_flag, check_integer
from lamella_core.errors import ConfigError
from lamella_core.mapping import Mapping

if TYPE_CHECKING:
    from lamella_builder.auto_parallel import Choice
    from lamella_core.config import ModelConfig
    from lamella_core.engine.build_config import BuildConfig

GPUS_PER_NODE = 8
_SIZES = ("tp_size", "pp_size", "moe_tp_size", "moe_ep_size")
_LONG = {
    "tp_size": "tensor_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "moe_tp_size": "moe_tensor_parallel_size",
    "moe_ep_size": "moe_expert_parallel_size",
}


def parse_partition(text: str | None) -> tuple[int, ...] | None:
    """Returns the layers of each stage from a command line's ``20,12``.

    Raises:
        ConfigError: something else than integers between commas.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--pp_partition is {text!r}; it must be like 20,12: the layers of each stage") from error


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """What was asked for. None: not said, so 1 or derived, or what a checkpoint or engine was made for.

    Attributes:
        tp_size: tensor-parallel ranks of a stage.
        pp_size: pipeline stages.
        moe_tp_size: of the tensor-parallel ranks, how many share one expert; -1 means None.
        moe_ep_size: groups of experts among the tensor-parallel ranks; -1 means None.
        pp_partition: layers of each stage.
        auto_parallel: choose the sizes for ``world_size`` ranks by a cost model.
        world_size: ranks in all.
        gpus_per_node: ranks of one machine.
        long_names: errors name the sizes as `LLM` does: ``tensor_parallel_size``.

    Raises:
        ConfigError: a size that is none, or sizes that contradict each other.
    """

    tp_size: int | None = None
    pp_size: int | None = None
    moe_tp_size: int | None = None
    moe_ep_size: int | None = None
    pp_partition: tuple[int, ...] | None = None
    auto_parallel: bool = False
    world_size: int | None = None
    gpus_per_node: int | None = None
    long_names: bool = False

    def __post_init__(self) -> None:
        check_flag("auto_parallel", self.auto_parallel)
        for name in ("moe_tp_size", "moe_ep_size"):
            if getattr(self, name) == -1:
                object.__setattr__(self, name, None)
        for name in (*_SIZES, "world_size", "gpus_per_node"):
            if getattr(self, name) is not None:
                check_integer(self.name_of(name), getattr(self, name), 1)
        if self.pp_partition is not None:
            if not isinstance(self.pp_partition, (list, tuple)):
                raise ConfigError(f"pp_partition is {self.pp_partition!r}; it must be the layers of each stage, a list")
            object.__setattr__(self, "pp_partition", tuple(self.pp_partition))
        if self.auto_parallel:
            self._check_auto()
        elif self.world_size is not None:
            self._check_world()

    def name_of(self, field: str) -> str:
        """Returns how errors name a field."""
        return _LONG.get(field, field) if self.long_names else field

    def _check_auto(self) -> None:
        set_too = [name for name in _SIZES if getattr(self, name) not in (None, 1)]
        set_too += ["pp_partition"] if self.pp_partition is not None else []
        if set_too:
            raise ConfigError(
                f"auto_parallel chooses the sizes, but {self.name_of(set_too[0])} is {getattr(self, set_too[0])}; "
                "leave it out, or leave auto_parallel out"
            )

    def _check_world(self) -> None:
        names, product = (
            f"{self.name_of('tp_size')} x {self.name_of('pp_size')}",
            (self.tp_size or 1) * (self.pp_size or 1),
        )
        if self.world_size != product:
            raise ConfigError(
                f"world_size is {self.world_size}, but {names} is {product}; leave world_size out, or set "
                "auto_parallel to have sizes chosen for that many ranks"
            )

    def mapping(self) -> Mapping:
        """Returns the mapping of sizes that are all said or derived.

        Raises:
            ConfigError: sizes of experts that do not multiply to ``tp_size``, or a partition of another length.
        """
        tp, pp = self.tp_size or 1, self.pp_size or 1
        return Mapping(
            world_size=tp * pp,
            tp_size=tp,
            pp_size=pp,
            moe_tp_size=self.moe_tp_size or -1,
            moe_ep_size=self.moe_ep_size or -1,
            gpus_per_node=self.gpus_per_node or GPUS_PER_NODE,
            pp_partition=self.pp_partition,
        )

    def resolve(
        self, read: Callable[[Mapping], ModelConfig], build: BuildConfig, *, num_local: int | None = None
    ) -> tuple[ModelConfig, Choice | None]:
        """Returns a model's configuration, seen from rank 0 of its mapping, and how auto_parallel chose that.

        Args:
            read: returns the configuration for a mapping.
            build: limits.
            num_local: ranks that one machine runs, unless ``gpus_per_node`` says so.

        Raises:
            ConfigError: sizes that the model rules out.
            OutOfMemoryError: auto_parallel found none that fit.
        """
        if not self.auto_parallel:
            config = read(self.mapping())
            config.mapping.pp_layers(config.num_hidden_layers)
            return config, None
        from lamella_builder.auto_parallel import choose_mapping, device_facts  # import torch
        from lamella_core.device import resolve_device

        if self.world_size is None:
            raise ConfigError("auto_parallel needs world_size, the number of ranks to choose sizes for")
        device = resolve_device(build.device)
        per_node = self.gpus_per_node or num_local or (GPUS_PER_NODE if device == "cuda" else None)
        facts = device_facts(device, self.world_size, per_node)
        choice = choose_mapping(read(Mapping()), build, self.world_size, facts)
        return read(replace(choice.mapping, gpus_per_node=self.gpus_per_node or GPUS_PER_NODE)), choice

    def check_same(self, have: Mapping, what: str, remedy: str) -> None:
        """Refuses sizes that differ from those that a checkpoint or an engine has.

        Raises:
            ConfigError: see above; it names ``what``, its sizes and ``remedy``.
        """
        pairs = {name: (getattr(self, name), getattr(have, name)) for name in (*_SIZES, "pp_partition", "world_size")}
        if self.auto_parallel:
            pairs = {"world_size": (self.world_size, have.world_size)}
        differing = [name for name, (asked, found) in pairs.items() if asked is not None and asked != found]
        if differing:
            experts = f", experts {have.moe_tp_size} x {have.moe_ep_size}" if have.moe_ep_size > 1 else ""
            name, ranks = differing[0], "1 rank" if have.world_size == 1 else f"{have.world_size} ranks"
            raise ConfigError(
                f"{self.name_of(name)} is {pairs[name][0]}, but {what} was made for {ranks}, tp_size {have.tp_size} x "
                f"pp_size {have.pp_size}{experts}; leave it out, or {remedy}"
            )
