"""RopeConfig: how rotary position embeddings turn, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lamella_core.checks import check_flag, check_integer, check_number
from lamella_core.errors import ConfigError, nearest_name

# Parameters of each rope type: True where a configuration must give them.
ROPE_PARAMETERS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "dynamic": {"factor": True},
    "qwen_dynamic": {"original_max_position_embeddings": True},
    "float16": {},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True,
               "original_max_position_embeddings": False},
    "yarn": {"factor": False, "original_max_position_embeddings": False, "attention_factor": False, "beta_fast": False,
             "beta_slow": False, "mscale": False, "mscale_all_dim": False, "truncate": False},
    "longrope": {"short_factor": True, "long_factor": True, "factor": False, "attention_factor": False,
                 "original_max_position_embeddings": False, "short_mscale": False, "long_mscale": False},
}  # fmt: skip
_LISTS = ("short_factor", "long_factor")  # one number per pair of rotating elements
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")  # 0 turns them off
_REMEDY = ". Check rope_parameters (or rope_theta, rope_scaling) in the model's config.json"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and its context extensions.

    ``scaling`` holds the parameters of ``rope_type`` under their Hugging Face names (factor, low_freq_factor, ...).

    Raises:
        ConfigError: an unknown rope type, or a parameter that is missing, unknown or of an impossible value.
    """

    rotary_dim: int  # leading dimensions of the head that rotate, in elements
    theta: float = 10000.0
    rope_type: str = "default"
    scaling: dict[str, Any] = field(default_factory=dict)
    interleaved: bool = False  # pairs (0,1),(2,3).. instead of (i, i + rotary_dim/2)
    temperature_length: int | None = None  # queries of layers that do not rotate grow by this many tokens' logarithms
    temperature_scale: float = 0.0  # with which they grow
    logn_length: int | None = None  # the query of position p >= it is also multiplied by log(p + 1) / log(logn_length)

    def __post_init__(self) -> None:
        check_number("rope_theta", self.theta, positive=True, remedy=_REMEDY)
        check_integer("rotary_dim", self.rotary_dim, 2, remedy=_REMEDY)
        if self.rotary_dim % 2:
            raise ConfigError(f"rotary_dim is {self.rotary_dim}; elements rotate in pairs, it must be even{_REMEDY}")
        check_flag("interleaved", self.interleaved)
        if self.temperature_length is not None:
            check_integer("floor_scale", self.temperature_length, 1, remedy=_REMEDY)
        if self.logn_length is not None:
            check_integer("logn_length", self.logn_length, 2, remedy=_REMEDY)
        if self.rope_type not in list(ROPE_PARAMETERS):
            raise ConfigError(
                f"rope type is {self.rope_type!r}; supported: {', '.join(ROPE_PARAMETERS)}"
                f"{nearest_name(str(self.rope_type), ROPE_PARAMETERS)}"
            )
        self._check_scaling(ROPE_PARAMETERS[self.rope_type])

    def _check_scaling(self, known: dict[str, bool]) -> None:
        kind, scaling = self.rope_type, self.scaling
        missing = [name for name, needed in known.items() if needed and scaling.get(name) is None]
        if missing:
            raise ConfigError(f"rope type {kind!r} needs {', '.join(missing)} in rope_parameters")
        for name, value in scaling.items():
            if name not in known:
                raise ConfigError(f"rope type {kind!r} has no parameter {name!r}{nearest_name(name, known)}")
            if name in _LISTS:
                self._check_list(name, value)
            elif name == "truncate":
                check_flag(f"{kind} rope's {name}", value, remedy=_REMEDY)
            else:
                check_number(f"{kind} rope's {name}", value, positive=name not in _MAY_BE_ZERO, remedy=_REMEDY)
        if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ConfigError(
                f"llama3 rope's low_freq_factor {scaling['low_freq_factor']} is not below high_freq_factor "
                f"{scaling['high_freq_factor']}{_REMEDY}"
            )

    def _check_list(self, name: str, values: object) -> None:
        pairs = self.rotary_dim // 2
        if not isinstance(values, (list, tuple)) or len(values) != pairs:
            raise ConfigError(
                f"{self.rope_type} rope's {name} must be a list of {pairs} numbers, half the rotating elements{_REMEDY}"
            )
        for value in values:
            check_number(f"a number of {self.rope_type} rope's {name}", value, positive=True, remedy=_REMEDY)
