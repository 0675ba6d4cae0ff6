"""ModelConfig: what an architecture is, resolved once from a config.json and never written again."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from lamella_core.checks import LARGEST_INTEGER, check_flag, check_integer, check_number
from lamella_core.errors import ConfigError, nearest_name
from lamella_core.mapping import Mapping
from lamella_core.quantization.config import QuantConfig
from lamella_core.rope_config import RopeConfig

if TYPE_CHECKING:
    from lamella_core.hf_config import HfConfig
    from lamella_core.prefix import PrefixRule

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_MOST_LAYERS = 10_000
_MOST_NUMBERS = 1 << 48  # in one weight: more is a typing error
_REMEDY = ". Check the model's config.json"
_DTYPE_ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}

# Declared types of a field (or how they begin) that are checked by class alone.
_TYPES: dict[str, tuple[type, str]] = {
    "str": (str, "text"),
    "tuple": (tuple, "a list"),
    "RopeConfig": (RopeConfig, "a RopeConfig"),
    "Mapping": (Mapping, "a Mapping"),
    "QuantConfig": (QuantConfig, "a QuantConfig"),
}

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as Hugging Face configs call them

C = TypeVar("C", bound="ModelConfig")


def resolve_dtype(dtype: str | torch.dtype | None, source: str | None = None) -> str:
    """Returns one of `DTYPES` names; "auto" and None mean ``source`` (what the model directory says), else float32.

    Raises:
        ConfigError: a dtype that weights cannot have.
    """
    if dtype is None or dtype == "auto":
        return resolve_dtype(source) if source else "float32"
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}{nearest_name(name, DTYPES)}")
    return name


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields that every decoder has; an architecture adds its own by subclassing.

    All sizes are of the whole model; what one rank holds follows from ``mapping``. Values are checked by the type of
    their field, those of subclasses too: int is a positive integer, float a finite number of at least 0, bool a bool. A
    list becomes the tuple that the field wants.

    Raises:
        ConfigError: a value that a field cannot have, or values that contradict each other or the mapping.
    """

    architecture: str  # Hugging Face class name, e.g. "LlamaForCausalLM"
    model_type: str  # Hugging Face model_type, e.g. "llama"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    embedding_size: int | None = None  # width of token embeddings and output layer; None: hidden_size
    rope: RopeConfig | None = None  # None: no rotary embedding
    local_rope: RopeConfig | None = None  # of layers with a window; None: ``rope`` holds for them too
    sliding_window: int | None = None  # tokens a query sees, its own included; None: all
    layer_types: tuple[str, ...] = ()  # FULL or SLIDING for each layer; empty: ``sliding_window`` holds for all
    embedding_scale: float = 1.0  # multiplies token embeddings, rounded to ``dtype``
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits become logit_softcap * tanh(logits / logit_softcap)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "float32"
    mapping: Mapping = field(default_factory=Mapping)
    quantization: QuantConfig = field(default_factory=QuantConfig)

    hf_model_types: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", resolve_dtype(self.dtype))
        for f in fields(self):
            if isinstance(getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
            _check_by_type(f.name, f.type, getattr(self, f.name))
        for token in self.eos_token_ids:
            check_integer("eos_token_id", token, 0, LARGEST_INTEGER, _REMEDY)
        check_integer("num_hidden_layers", self.num_hidden_layers, 1, _MOST_LAYERS, _REMEDY)
        widest = max(self.vocab_size, self.intermediate_size, self.num_attention_heads * self.head_dim)
        if widest * self.hidden_size > _MOST_NUMBERS:
            raise ConfigError(
                f"hidden_size {self.hidden_size} makes a weight of {widest} x {self.hidden_size} with vocab_size, "
                f"intermediate_size or the heads' size; no model is that large{_REMEDY}"
            )
        if self.rope is not None and self.rope.rotary_dim > self.head_dim:
            raise ConfigError(f"rotary_dim {self.rope.rotary_dim} exceeds head_dim {self.head_dim}{_REMEDY}")
        self._check_heads()
        self._check_layer_types()

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}{_REMEDY}"
            )
        heads, tp = self.num_attention_heads, self.mapping.tp_size
        if heads % tp:
            raise ConfigError(f"tp_size {tp} does not divide num_attention_heads {heads}; use a divisor of {heads}")
        kv = self.num_key_value_heads
        if kv % tp and tp % kv:
            raise ConfigError(f"tp_size {tp} and num_key_value_heads {kv}: one must be a multiple of the other")

    def _check_layer_types(self) -> None:
        types, layers = self.layer_types, self.num_hidden_layers
        if types and (len(types) != layers or not all(kind in (FULL, SLIDING) for kind in types)):
            raise ConfigError(f"layer_types is {types}; it needs {FULL} or {SLIDING} for each of the {layers} layers")
        if SLIDING in types and self.sliding_window is None:
            raise ConfigError("layer_types has sliding layers, but use_sliding_window is off or sliding_window null")

    def layer_window(self, index: int) -> int | None:
        """Returns how many tokens a query of layer ``index`` sees, its own included; None: all."""
        return None if self.layer_types and self.layer_types[index] == FULL else self.sliding_window

    @classmethod
    def from_hf(cls, hf: HfConfig) -> dict[str, Any]:
        """Returns the architecture's fields as read from a Hugging Face config; each architecture implements it."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is read from a Hugging Face config")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_positions(self) -> int:
        """Tokens that a sequence can have; rope type "dynamic" stretches ``max_position_embeddings`` by its factor."""
        if self.rope is None or self.rope.rope_type != "dynamic":
            return self.max_position_embeddings
        return int(self.max_position_embeddings * max(self.rope.scaling["factor"], 1))

    @property
    def prefix_rule(self) -> PrefixRule | None:
        """What part of a prompt is read in both directions; None: nothing, as in most decoders."""
        return None

    def with_mapping(self: C, mapping: Mapping) -> C:
        """Returns the same configuration for another mapping (or the same mapping seen from another rank)."""
        return replace(self, mapping=mapping)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready fields, without the mapping's rank: one file serves all ranks."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Mapping):
                value = value.to_dict(with_rank=False)
            elif isinstance(value, QuantConfig):
                value = value.to_dict()
            elif isinstance(value, RopeConfig):
                value = {g.name: getattr(value, g.name) for g in fields(value)}
            elif isinstance(value, tuple):
                value = list(value)
            out[f.name] = value
        return out

    @classmethod
    def from_dict(cls: type[C], data: dict[str, Any], rank: int = 0) -> C:
        """Inverse of `to_dict`, seen from ``rank``. Tuples may arrive as JSON lists.

        Raises:
            ConfigError: an unknown or missing field.
        """
        known = {f.name: f for f in fields(cls)}
        for name in data:
            if name not in known:
                raise ConfigError(f"{cls.__name__} has no field {name!r}{nearest_name(name, known)}")
        values = dict(data)
        values["mapping"] = Mapping.from_dict({**data.get("mapping", {}), "rank": rank})
        values["quantization"] = QuantConfig.from_dict(data.get("quantization", {}))
        for name in ("rope", "local_rope"):
            if values.get(name) is not None:
                values[name] = RopeConfig(**values[name])
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}; the stored configuration is incomplete") from error


def _check_by_type(name: str, annotation: object, value: object) -> None:
    """Checks a field of `ModelConfig` by its declared type.

    Raises:
        ConfigError: the value is not of that type, or out of range.
    """
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if kind == "int" or (kind == "int | None" and value is not None):
        check_integer(name, value, 0 if name.endswith("_token_id") else 1, LARGEST_INTEGER, _REMEDY)
    elif kind == "float" or (kind == "float | None" and value is not None):
        check_number(name, value, positive=kind != "float", remedy=_REMEDY)
    elif kind == "bool":
        check_flag(name, value, remedy=_REMEDY)
    for declared, (type_, wanted) in _TYPES.items():
        if kind.startswith(declared) and not isinstance(value, type_) and not (value is None and kind.endswith("None")):
            raise ConfigError(f"{name} is {value!r}; it must be {wanted}{_REMEDY}")
