"""QuantAlgo and QuantConfig: what is quantized, and how; read from and written to a checkpoint's config."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from lamella_core.checks import check_flag, check_integer
from lamella_core.errors import ConfigError, nearest_name

KV_CACHE_DTYPES = ("auto", "fp8")
ACTIVATION_SCHEMES = ("static", "dynamic")


class QuantAlgo(str, Enum):
    """Names of quantization schemes, for weights (and activations) or for the KV cache."""

    NO_QUANT = "NO_QUANT"
    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    FP8_BLOCK_SCALES = "FP8_BLOCK_SCALES"
    INT8 = "INT8"
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W4A16_AWQ = "W4A16_AWQ"
    W4A16_GPTQ = "W4A16_GPTQ"
    W4A8_AWQ = "W4A8_AWQ"
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
    NVFP4 = "NVFP4"


def parse_algo(value: QuantAlgo | str | None, field: str) -> QuantAlgo | None:
    """Returns the algorithm named by ``value`` (any case; None and NO_QUANT mean none).

    Raises:
        ConfigError: an unknown name.
    """
    if value is None:
        return None
    name = str(value.value if isinstance(value, QuantAlgo) else value).upper()
    if name not in QuantAlgo.__members__:
        known = ", ".join(QuantAlgo.__members__)
        raise ConfigError(f"{field} is {value!r}; known: {known}{nearest_name(name, QuantAlgo.__members__)}")
    algo = QuantAlgo[name]
    return None if algo is QuantAlgo.NO_QUANT else algo


def parse_options(quant: str | None, kv_cache_dtype: str = "auto") -> QuantConfig | None:
    """Returns what the command line options ``--quant`` and ``--kv-cache-dtype`` ask for; None: nothing.

    Args:
        quant: name of an algorithm in any case, dashes or underscores; "none" and None mean as the weights are.
        kv_cache_dtype: "auto" (as the weights say) or "fp8".

    Raises:
        ConfigError: an unknown name.
    """
    name = quant.upper().replace("-", "_") if quant and quant.lower() != "none" else None
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ConfigError(f"--kv-cache-dtype is {kv_cache_dtype!r}; allowed: {', '.join(KV_CACHE_DTYPES)}")
    config = QuantConfig(parse_algo(name, "--quant"), QuantAlgo.FP8 if kv_cache_dtype == "fp8" else None)
    return config if config.is_quantized else None


@dataclass(frozen=True)
class QuantConfig:
    """How a model's weights, activations and KV cache are quantized. The default quantizes nothing.

    Attributes:
        quant_algo: of the layers' linears. FP8: one scale per weight tensor; FP8_PER_CHANNEL_PER_TOKEN: one per output
            feature, and activations quantized as they come, one scale per token. Embedding, output layer and routers
            keep the model's dtype.
        kv_cache_quant_algo: FP8 or none.
        group_size: weights that share a scale, along the input dimension, where the algorithm has groups.
        has_zero_point: whether quantized zero is not 0.
        exclude_modules: name patterns (fnmatch) of linears that stay in the model's dtype. Names are those of the
            Hugging Face checkpoint ("model.layers.0.mlp*") or of this library ("layers.0.mlp*"); a name also excludes
            everything in the module.
        activation_scheme: for FP8: "static": activations are quantized with the checkpoint's calibrated scales;
            "dynamic": as they come, one scale per token; None: what the checkpoint offers.

    Raises:
        ConfigError: an unknown algorithm, or a value that a field cannot have.
    """

    quant_algo: QuantAlgo | None = None
    kv_cache_quant_algo: QuantAlgo | None = None
    group_size: int = 128
    has_zero_point: bool = False
    exclude_modules: tuple[str, ...] = ()
    activation_scheme: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "quant_algo", parse_algo(self.quant_algo, "QuantConfig.quant_algo"))
        object.__setattr__(
            self, "kv_cache_quant_algo", parse_algo(self.kv_cache_quant_algo, "QuantConfig.kv_cache_quant_algo")
        )
        if self.kv_cache_quant_algo not in (None, QuantAlgo.FP8):
            raise ConfigError(
                f"QuantConfig.kv_cache_quant_algo is {self.kv_cache_quant_algo.value}; allowed: FP8, None"
            )
        if self.activation_scheme not in (None, *ACTIVATION_SCHEMES):
            raise ConfigError(
                f"QuantConfig.activation_scheme is {self.activation_scheme!r}; allowed: "
                f"{', '.join(ACTIVATION_SCHEMES)}, None"
            )
        check_integer("QuantConfig.group_size", self.group_size, 1)
        check_flag("QuantConfig.has_zero_point", self.has_zero_point)
        patterns = self.exclude_modules
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ConfigError(f"QuantConfig.exclude_modules is {patterns!r}; it must be a list of name patterns")
        object.__setattr__(self, "exclude_modules", tuple(patterns))

    @property
    def is_quantized(self) -> bool:
        return self.quant_algo is not None or self.kv_cache_quant_algo is not None

    @property
    def has_static_activations(self) -> bool:
        """Whether linears hold a scale of their input; with `activation_scheme` None they do."""
        return self.quant_algo is QuantAlgo.FP8 and self.activation_scheme != "dynamic"

    def is_module_excluded_from_quantization(self, name: str) -> bool:
        """Whether a pattern of ``exclude_modules`` matches ``name``, or a module that it lies in."""
        return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in self.exclude_modules)

    def contradiction(self, asked: QuantConfig, *, is_final: bool) -> str | None:
        """Returns the first field in which ``asked`` wants something else than this, or None.

        Fields of ``asked`` that hold their default want nothing.

        Args:
            asked: what the user wants.
            is_final: of weights that are stored in Lamella's own formats; the quantization of others may still be
                extended: a float8 KV cache beside any weights, dynamic activations where static scales are there.
        """
        if asked.quant_algo not in (None, self.quant_algo):
            return "quant_algo"
        kv = asked.kv_cache_quant_algo
        if kv is not None and kv is not self.kv_cache_quant_algo and (is_final or self.kv_cache_quant_algo is not None):
            return "kv_cache_quant_algo"
        if set(asked.exclude_modules) - set(self.exclude_modules) - {"lm_head", "*lm_head", "*lm_head*"}:
            return "exclude_modules"
        scheme = asked.activation_scheme
        if scheme not in (None, self.activation_scheme) and (is_final or scheme == "static"):
            return "activation_scheme"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready fields."""
        fields = asdict(self)
        for name in ("quant_algo", "kv_cache_quant_algo"):
            fields[name] = fields[name].value if fields[name] else None
        fields["exclude_modules"] = list(self.exclude_modules)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: an unknown field or algorithm.
        """
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"QuantConfig has no field {unknown[0]!r}; known: {', '.join(cls.__dataclass_fields__)}")
        return cls(**fields)
