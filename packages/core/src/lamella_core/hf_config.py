"""HfConfig: a Hugging Face config.json, read as plain data and resolved into a `ModelConfig`.

No code of the model's repository runs, and transformers' own config classes are not involved: each model file says in
`from_hf` which keys it reads. Keys are recorded as they are read, which is how an unknown override is noticed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping as MappingABC
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lamella_core.checkpoint.formats import CHECKPOINT_KEY, CONFIG_FILE, read_json_object
from lamella_core.checks import LARGEST_INTEGER, check_flag, check_integer, check_number
from lamella_core.config import ModelConfig, resolve_dtype
from lamella_core.errors import CheckpointError, ConfigError, UnsupportedModelError, nearest_name
from lamella_core.layers.activation import get_activation
from lamella_core.mapping import Mapping
from lamella_core.quantization.config import QuantConfig
from lamella_core.quantization.hugging_face import QUANT_FILE, combined, read_quantization
from lamella_core.rope_config import ROPE_PARAMETERS, RopeConfig

C = TypeVar("C", bound=ModelConfig)

_REQUIRED = object()
_ARGUMENTS = ("architecture", "model_type", "dtype", "mapping")  # fields that overrides cannot name

_ROPE_ALIASES = {"su": "longrope"}

# Networks that call themselves what later, other ones do: (architecture, key that only their files have) -> our name.
_EARLIER = {
    ("ChatGLMModel", "position_encoding_2d"): "ChatGLM1Model",
    ("ChatGLMForConditionalGeneration", "position_encoding_2d"): "ChatGLM1Model",
}
_MAMBA_SSM = {"Mamba1": ["MambaForCausalLM"], "Mamba2": ["Mamba2ForCausalLM"]}  # by ssm_cfg.layer


class HfConfig:
    """The keys of one config.json, with overrides laid over them.

    Attributes:
        where: the file, for messages.
        architecture: the first entry of ``architectures``; another name where two networks share it.
        model_type: the entry of that name, "" when absent or no text.
    """

    def __init__(
        self,
        data: dict[str, Any],
        where: str,
        overrides: dict[str, Any] | None = None,
        generation: Any = None,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        self.where = where
        self._data = data
        self._overrides = dict(overrides or {})
        self._generation = generation if isinstance(generation, dict) else {}
        self._quantization = quantization
        self._read: set[str] = set()
        names = data.get("architectures", _mamba_ssm_architectures(data))
        if CHECKPOINT_KEY in data:
            raise ConfigError(f"{where} is that of a Lamella checkpoint; load it with from_checkpoint")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"{where} names no architecture: 'architectures' is {names!r}; it must be a list such as "
                '["LlamaForCausalLM"]. Add the class that the weights belong to'
            )
        self.architecture: str = _own_name(names[0], data)
        model_type = data.get("model_type")
        self.model_type: str = model_type if isinstance(model_type, str) else ""

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """Returns the value of the first of ``names`` that is present (it may be null), else the default.

        Raises:
            ConfigError: none is present and there is no default.
        """
        self._read.update(names)
        for source in (self._overrides, self._data):
            for name in names:
                if name in source:
                    return source[name]
        if default is _REQUIRED:
            raise ConfigError(f"{self.where} lacks {names[0]!r}, which {self.architecture} needs")
        return default

    def require(self, name: str, allowed: Sequence[Any], default: Any) -> Any:
        """Returns the value of ``name``, which must be one of ``allowed``.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(name, default=default)
        if value not in allowed:
            raise ConfigError(
                f"{self.where}: {name} is {value!r}; {self.architecture} supports {' or '.join(map(repr, allowed))}"
            )
        return value

    def require_architecture(self, architectures: Sequence[str], owner: str) -> None:
        """Checks that the file is of one of ``architectures``.

        Raises:
            UnsupportedModelError: it is of another; ``owner`` names the class in the message.
        """
        if self.architecture not in architectures:
            raise UnsupportedModelError(
                f"{self.where} holds {self.architecture}; {owner} loads {', '.join(architectures)}. "
                "AutoModelForCausalLM picks the class by itself"
            )

    def integer(self, *names: str, default: Any = _REQUIRED, least: int = 1, nullable: bool = False) -> Any:
        """Returns the integer of the first of ``names`` that is present, else the default.

        Raises:
            ConfigError: none is present and there is no default, or it is no integer of at least ``least`` (null is
                one with ``nullable``).
        """
        value = self.get(*names, default=default)
        if value is not None or not nullable:
            check_integer(f"{self.where}: {names[0]}", value, least, LARGEST_INTEGER)
        return value

    def number(self, *names: str, default: float) -> float:
        """Returns the number of the first of ``names`` that is present, else the default.

        Raises:
            ConfigError: it is no finite number above 0.
        """
        value = self.get(*names, default=default)
        check_number(f"{self.where}: {names[0]}", value, positive=True)
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """Returns the truth value of ``name``; null means false.

        Raises:
            ConfigError: it is neither true, false nor null.
        """
        value = self.get(name, default=default)
        if value is not None:
            check_flag(f"{self.where}: {name}", value)
        return bool(value)

    def layer_types(self, default: Sequence[str]) -> Any:
        """Returns the kind of each layer, `FULL` or `SLIDING`: as given, else ``default``; the config checks them.

        Raises:
            ConfigError: what is given is no list.
        """
        given = self.get("layer_types", default=None)
        if given is not None and not isinstance(given, list):
            raise ConfigError(f"{self.where}: layer_types is {given!r}; it must be a list")
        return list(default) if given is None else given

    def nested(self, name: str, defaults: MappingABC[str, Any] | None = None, outer: Sequence[str] = ()) -> HfConfig:
        """Returns the object ``name`` of the file as a configuration of its own, empty if absent.

        Args:
            name: of the object.
            defaults: values of keys that it lacks.
            outer: keys whose values beside the object, unless null, count before those in it.

        Raises:
            ConfigError: it is no object.
        """
        given = self.get(name, default=None) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{self.where}: {name} is {given!r}; it must be an object")
        beside = {key: self.get(key, default=None) for key in outer}
        beside = {key: value for key, value in beside.items() if value is not None}
        data = {**(defaults or {}), **given, **beside, "architectures": [self.architecture]}
        return HfConfig(data, f"{self.where}: {name}", generation=self._generation)

    def head_dim(self, hidden_size: int, heads: int) -> int:
        """Returns head_dim: as given, else hidden_size / heads.

        Raises:
            ConfigError: it is not given and the heads do not divide the hidden size.
        """
        given = self.integer("head_dim", default=None, nullable=True)
        if given is not None:
            return given
        if hidden_size % heads:
            raise ConfigError(
                f"{self.where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}; "
                "correct one of them or give head_dim"
            )
        return hidden_size // heads

    def activation(self, *names: str, default: str) -> str:
        """Returns the name of the activation function.

        Raises:
            ConfigError: it is not supported.
        """
        value = self.get(*names, default=default)
        get_activation(value)
        return value

    def rope(
        self,
        head_dim: int,
        default_theta: float = 10000.0,
        *,
        default_partial: float = 1.0,
        interleaved: bool = False,
        layer_type: str | None = None,
    ) -> RopeConfig:
        """Returns the rotary embedding, from ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``.

        ``default_partial`` is the rotating part of a head where the file does not say, see ``partial_rotary_factor``.
        ``layer_type`` chooses where rope_parameters has an object for each kind of layer.

        Raises:
            ConfigError: an unknown rope type, or one whose parameters are incomplete or impossible.
        """
        given = self.get("rope_scaling", default=None) or self.get("rope_parameters", default=None) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{self.where}: rope_parameters is {given!r}; it must be an object")
        nested = [name for name, value in given.items() if isinstance(value, dict)]
        if layer_type in nested:
            given = given[layer_type]
        elif nested:
            raise ConfigError(
                f"{self.where}: rope_parameters differ per kind of layer ({', '.join(nested)}), which "
                f"{self.architecture} does not support"
            )
        theta = _first_given(given.get("rope_theta"), self.get("rope_theta", default=None), default_theta)
        kind = given.get("rope_type") or given.get("type") or "default"
        kind = _ROPE_ALIASES.get(kind, kind) if isinstance(kind, str) else str(kind)
        partial = given.get("partial_rotary_factor", self.get("partial_rotary_factor", default=None))
        partial = _first_given(partial, default_partial)
        check_number(f"{self.where}: partial_rotary_factor", partial, positive=True)
        return RopeConfig(
            rotary_dim=int(head_dim * partial),
            theta=theta,
            rope_type=kind,
            scaling=self._rope_scaling(kind, given),
            interleaved=interleaved,
        )

    def _rope_scaling(self, kind: str, given: dict[str, Any]) -> dict[str, Any]:
        known = ROPE_PARAMETERS.get(kind, {})
        scaling = {name: given[name] for name in known if given.get(name) is not None}
        if "original_max_position_embeddings" in known:
            longest = self.integer("max_position_embeddings")
            outer = self.integer("original_max_position_embeddings", default=None, nullable=True)
            original = _first_given(outer, scaling.get("original_max_position_embeddings"), longest)
            check_number(f"{self.where}: original_max_position_embeddings", original, positive=True)
            scaling["original_max_position_embeddings"] = original
            scaling.setdefault("factor", longest / original)
        return scaling

    def token_ids(self) -> dict[str, Any]:
        """Returns the special token fields; generation_config.json, where present, says which tokens end a text.

        Negative ids, which some files use for tokens that do not exist, are left out.
        """
        eos = self._generation.get("eos_token_id")
        if eos is None or "eos_token_id" in self._overrides:
            eos = self.get("eos_token_id", default=None)
        ids = eos if isinstance(eos, list) else [eos]
        return {
            "bos_token_id": _token(self.get("bos_token_id", default=None)),
            "eos_token_ids": tuple(token for token in map(_token, ids) if token is not None),
            "pad_token_id": _token(self.get("pad_token_id", default=None)),
        }

    def decoder_fields(self) -> dict[str, Any]:
        """Returns the `ModelConfig` fields whose keys are the same in most decoders (Llama's names)."""
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", default=None, nullable=True)
        return {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": hidden,
            "num_hidden_layers": self.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": heads if kv_heads is None else kv_heads,
            "head_dim": self.head_dim(hidden, heads),
            "intermediate_size": self.integer("intermediate_size"),
            "max_position_embeddings": self.integer("max_position_embeddings"),
            "hidden_act": self.activation("hidden_act", default="silu"),
            "tie_word_embeddings": self.flag("tie_word_embeddings", default=False),
            **self.token_ids(),
        }

    def resolve(
        self,
        config_class: type[C],
        *,
        dtype: str | torch.dtype | None = "auto",
        mapping: Mapping | None = None,
        quantization: QuantConfig | None = None,
    ) -> C:
        """Returns the configuration of the architecture, overrides included.

        Args:
            config_class: of the architecture.
            dtype: of the weights.
            mapping: how the model is spread over ranks; by default one rank.
            quantization: what the user wants; weights that are quantized say so themselves.

        Raises:
            ConfigError: contradictory or unsupported values, or an override that the architecture does not know.
        """
        own = read_quantization(self._data, self._quantization, self.where)
        stored = self._data.get("dtype") or self._data.get("torch_dtype")
        types = config_class.hf_model_types
        config = config_class(
            **config_class.from_hf(self),
            architecture=self.architecture,
            model_type=self.model_type if self.model_type in types else types[0],
            dtype=resolve_dtype(dtype, stored),
            mapping=mapping or Mapping(),
            quantization=combined(own, quantization, self.where),
        )
        return replace(config, **self._field_overrides(config_class))

    def _field_overrides(self, config_class: type[ModelConfig]) -> dict[str, Any]:
        """Returns the overrides that name a field and no key of config.json; checks that nothing else is left."""
        names = {f.name for f in fields(config_class)} - set(_ARGUMENTS)
        for name in self._overrides:
            if name not in names | self._read:
                raise ConfigError(
                    f"{self.architecture} has no configuration field {name!r}{nearest_name(name, names | self._read)}"
                )
        return {name: value for name, value in self._overrides.items() if name not in self._read}


def read_hf_config(directory: str | os.PathLike[str], overrides: MappingABC[str, Any] | None = None) -> HfConfig:
    """Reads the config.json (and generation_config.json, hf_quant_config.json) of a directory.

    Raises:
        CheckpointError: config.json is missing or is not a JSON object.
        ConfigError: it names no architecture.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {path.parent} is not a Hugging Face model directory")
    generation, quantization = (
        read_json_object(path.with_name(name)) if path.with_name(name).is_file() else None
        for name in ("generation_config.json", QUANT_FILE)
    )
    return HfConfig(read_json_object(path), str(path), dict(overrides or {}), generation, quantization)


def _mamba_ssm_architectures(data: dict[str, Any]) -> list[str] | None:
    """Returns the architecture of a config.json as mamba_ssm writes it, which names none; None for any other."""
    inner = data.get("ssm_cfg")
    if not isinstance(inner, dict) or "d_model" not in data:
        return None
    kind = inner.get("layer", "Mamba1")
    return _MAMBA_SSM.get(kind) if isinstance(kind, str) else None


def _first_given(*values: Any) -> Any:
    """Returns the first value that is not None."""
    return next((value for value in values if value is not None), None)


def _token(value: Any) -> Any:
    return None if isinstance(value, int) and value < 0 else value


def _own_name(architecture: str, data: dict[str, Any]) -> str:
    """Returns what we call the architecture of a config.json."""
    return next(
        (name for (given, key), name in _EARLIER.items() if given == architecture and key in data), architecture
    )
