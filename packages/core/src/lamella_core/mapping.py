"""Mapping: which rank holds which shard of a model.

Rank order: tensor parallel is fastest, pipeline slowest: ``rank = pp_rank * tp_size + tp_rank``. Inside a tensor
group the experts of a MoE layer are split ``moe_tp_size x moe_ep_size``, expert parallel fastest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from lamella_core.checks import check_integer
from lamella_core.errors import ConfigError


@dataclass(frozen=True)
class Mapping:
    """How a model is spread over ``world_size`` ranks, seen from ``rank``.

    ``moe_tp_size`` and ``moe_ep_size`` default to -1 (derived: expert size 1, the rest tensor parallel); their product
    must be ``tp_size``. ``pp_partition`` gives the number of layers of each pipeline stage when they are not even.

    Raises:
        ConfigError: the sizes do not multiply to ``world_size``, a rank is out of range, or a partition does not fit.
    """

    world_size: int = 1
    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    moe_tp_size: int = -1
    moe_ep_size: int = -1
    gpus_per_node: int = 8
    pp_partition: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "tp_size", "pp_size", "gpus_per_node"):
            check_integer(f"Mapping.{name}", getattr(self, name), 1)
        for name in ("moe_tp_size", "moe_ep_size"):
            check_integer(f"Mapping.{name}", getattr(self, name), -1)
        if self.tp_size * self.pp_size != self.world_size:
            raise ConfigError(
                f"Mapping: tp_size {self.tp_size} x pp_size {self.pp_size} = {self.tp_size * self.pp_size}, but "
                f"world_size is {self.world_size}; make the product equal to world_size"
            )
        check_integer("Mapping.rank", self.rank, 0, self.world_size - 1, f" (world_size is {self.world_size})")
        self._derive_moe_sizes()
        if self.pp_partition is not None:
            self._check_partition(self.pp_partition)
            object.__setattr__(self, "pp_partition", tuple(self.pp_partition))

    def _check_partition(self, counts: object) -> None:
        if not isinstance(counts, (list, tuple)) or len(counts) != self.pp_size:
            raise ConfigError(
                f"Mapping.pp_partition is {counts!r}; it needs a list of {self.pp_size} entries (pp_size)"
            )
        for count in counts:
            check_integer("an entry of Mapping.pp_partition", count, 1)

    def _derive_moe_sizes(self) -> None:
        moe_tp, moe_ep = self.moe_tp_size, self.moe_ep_size
        if moe_tp == -1 and moe_ep == -1:
            moe_tp, moe_ep = self.tp_size, 1
        elif moe_tp == -1 and moe_ep > 0:
            moe_tp = self.tp_size // moe_ep
        elif moe_ep == -1 and moe_tp > 0:
            moe_ep = self.tp_size // moe_tp
        if moe_tp < 1 or moe_ep < 1 or moe_tp * moe_ep != self.tp_size:
            raise ConfigError(
                f"Mapping: moe_tp_size {self.moe_tp_size} x moe_ep_size {self.moe_ep_size} must equal tp_size "
                f"{self.tp_size} (-1 derives a size from the other)"
            )
        object.__setattr__(self, "moe_tp_size", moe_tp)
        object.__setattr__(self, "moe_ep_size", moe_ep)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank % self.moe_ep_size

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_rank // self.moe_ep_size

    @property
    def tp_group(self) -> tuple[int, ...]:
        """Ranks that share this rank's layers, in tp_rank order."""
        first = self.pp_rank * self.tp_size
        return tuple(range(first, first + self.tp_size))

    @property
    def pp_group(self) -> tuple[int, ...]:
        """Ranks that hold the same shard of the other stages, in pp_rank order."""
        return tuple(range(self.tp_rank, self.world_size, self.tp_size))

    @property
    def moe_tp_group(self) -> tuple[int, ...]:
        """Ranks that split the same experts among them, in moe_tp_rank order."""
        return tuple(self.tp_group[t * self.moe_ep_size + self.moe_ep_rank] for t in range(self.moe_tp_size))

    @property
    def moe_ep_group(self) -> tuple[int, ...]:
        """Ranks that hold the other experts, in moe_ep_rank order."""
        first = self.moe_tp_rank * self.moe_ep_size
        return self.tp_group[first : first + self.moe_ep_size]

    @property
    def node_rank(self) -> int:
        return self.rank // self.gpus_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.gpus_per_node

    @property
    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def prev_pp_rank(self) -> int | None:
        """Global rank of the stage before this one, None on the first."""
        return None if self.is_first_pp_rank else self.rank - self.tp_size

    @property
    def next_pp_rank(self) -> int | None:
        """Global rank of the stage after this one, None on the last."""
        return None if self.is_last_pp_rank else self.rank + self.tp_size

    def pp_layers(self, num_layers: int) -> range:
        """Returns the global indices of the layers on this stage; the first stages take the remainder.

        Raises:
            ConfigError: fewer layers than stages, or ``pp_partition`` does not add up to ``num_layers``.
        """
        counts = self.pp_partition
        if counts is None:
            if num_layers < self.pp_size:
                raise ConfigError(
                    f"pp_size {self.pp_size} exceeds the model's {num_layers} layers; use at most {num_layers} stages"
                )
            base, extra = divmod(num_layers, self.pp_size)
            counts = tuple(base + (stage < extra) for stage in range(self.pp_size))
        elif sum(counts) != num_layers:
            raise ConfigError(
                f"Mapping.pp_partition {counts} adds up to {sum(counts)} layers; the model has {num_layers}"
            )
        first = sum(counts[: self.pp_rank])
        return range(first, first + counts[self.pp_rank])

    def ep_experts(self, num_experts: int) -> range:
        """Returns the global indices of the experts on this rank.

        Raises:
            ConfigError: ``num_experts`` is not divisible by ``moe_ep_size``.
        """
        if num_experts % self.moe_ep_size:
            raise ConfigError(
                f"moe_ep_size {self.moe_ep_size} does not divide the model's {num_experts} experts; "
                "choose a divisor of the number of experts"
            )
        per_rank = num_experts // self.moe_ep_size
        return range(self.moe_ep_rank * per_rank, (self.moe_ep_rank + 1) * per_rank)

    def with_rank(self, rank: int) -> Mapping:
        """Returns the same mapping seen from another rank."""
        return replace(self, rank=rank)

    def to_dict(self, *, with_rank: bool = True) -> dict[str, Any]:
        """Returns JSON-ready fields; ``with_rank=False`` leaves the rank out, as in files that serve all ranks."""
        fields = asdict(self)
        if self.pp_partition is not None:
            fields["pp_partition"] = list(self.pp_partition)
        if not with_rank:
            del fields["rank"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Mapping:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: an unknown field.
        """
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"Mapping has no field {unknown[0]!r}; known: {', '.join(cls.__dataclass_fields__)}")
        return cls(**fields)
