"""How a Hugging Face directory says that its weights are quantized, read into a `QuantConfig`.

Four spellings are read: ``hf_quant_config.json`` as NVIDIA's ModelOpt writes it, and ``quantization_config`` of
config.json with quant_method "modelopt" (newer ModelOpt), "compressed-tensors" or "fp8". All name the same tensors:
``weight`` float8, ``weight_scale``, ``input_scale`` where activations are static, ``k_scale`` and ``v_scale``.

"fp8" with a weight_block_size has scales per block of a weight instead, and "mxfp4" packs 4-bit floats. Such weights
count as not quantized: they are widened as they are read, see `lamella_core.checkpoint.block_scales` and ``mxfp4``.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from lamella_core.errors import ConfigError
from lamella_core.quantization.config import QuantAlgo, QuantConfig

if TYPE_CHECKING:
    from lamella_core.config import ModelConfig

logger = logging.getLogger(__name__)

C = TypeVar("C", bound="ModelConfig")

QUANT_FILE = "hf_quant_config.json"
READABLE = (QuantAlgo.FP8, QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN)
_REMEDY = "use the unquantized model, or one quantized to FP8"
MXFP4 = "mxfp4"
_METHODS = ("modelopt", "compressed-tensors", "fp8", MXFP4)


def read_quantization(config: dict[str, Any], quant_file: dict[str, Any] | None, where: str) -> QuantConfig | None:
    """Returns how the weights beside a config.json are quantized; None: not at all.

    Args:
        config: content of config.json.
        quant_file: content of hf_quant_config.json, if there is one.
        where: named in errors.

    Raises:
        ConfigError: a scheme that cannot be read, or files that contradict each other or are damaged.
    """
    described = config.get("quantization_config")
    own = None
    if described:
        own = _from_config(_object(described, "quantization_config", where), where)
    if quant_file is None:
        return own if own is not None and own.is_quantized else None
    found = _from_modelopt(_object(quant_file.get("quantization"), "quantization", QUANT_FILE), QUANT_FILE)
    if own is not None and found.quant_algo is not own.quant_algo:
        raise ConfigError(
            f"{where}: quantization_config says {_name(own)} and {QUANT_FILE} beside it {_name(found)}; remove the one "
            "that does not belong to the weights"
        )
    return found if found.is_quantized else None


def combined(own: QuantConfig | None, asked: QuantConfig | None, where: str) -> QuantConfig:
    """Returns the quantization of a model whose weights have ``own`` and whose user wants ``asked``.

    Raises:
        ConfigError: the two contradict each other.
    """
    asked = asked or QuantConfig()
    if own is None:
        return asked
    field = own.contradiction(asked, is_final=False)
    if field is not None:
        raise ConfigError(
            f"quant_config.{field} is {getattr(asked, field)!r}, but the weights beside {where} are quantized with "
            f"{getattr(own, field)!r}; leave quant_config out, or use the unquantized model"
        )
    return replace(
        own,
        kv_cache_quant_algo=own.kv_cache_quant_algo or asked.kv_cache_quant_algo,
        activation_scheme=asked.activation_scheme or own.activation_scheme,
    )


def loadable(config: C) -> C:
    """Returns a model's configuration with what reading its weights decides.

    Weights that are quantized as they are read come without scales of the activations, which then are dynamic.
    """
    quantization = config.quantization
    if quantization.quant_algo is not QuantAlgo.FP8 or quantization.activation_scheme is not None:
        return config
    logger.info("FP8 without calibration: activations are quantized as they come, with one scale per token")
    return replace(config, quantization=replace(quantization, activation_scheme="dynamic"))


def _from_config(fields: dict[str, Any], where: str) -> QuantConfig:
    method = fields.get("quant_method")
    if method == "modelopt":
        return _from_modelopt(_object(fields.get("quantization", fields), "quantization", where), where)
    if method == "compressed-tensors":
        return _from_compressed_tensors(fields, where)
    if method == "fp8":
        return _from_fp8(fields, where)
    if method == MXFP4:
        return QuantConfig()
    raise ConfigError(
        f"{where}: the weights are quantized with quant_method {method!r}, which cannot be read; readable: "
        f"{', '.join(_METHODS)}. Else {_REMEDY}"
    )


def _from_modelopt(fields: dict[str, Any], where: str) -> QuantConfig:
    kv = fields.get("kv_cache_quant_algo") or _kv_algo(fields.get("kv_cache_scheme"), where)
    excluded = fields.get("exclude_modules") or fields.get("ignore") or ()
    return _checked(fields.get("quant_algo"), kv, excluded, "static", where)


def _from_compressed_tensors(fields: dict[str, Any], where: str) -> QuantConfig:
    groups = list(_object(fields.get("config_groups"), "config_groups", where).values())
    if len(groups) != 1:
        raise ConfigError(
            f"{where}: config_groups has {len(groups)} groups; one for all linears can be read: {_REMEDY}"
        )
    group = _object(groups[0], "config_groups", where)
    weights = _object(group.get("weights"), "weights", where)
    inputs = _object(group.get("input_activations"), "input_activations", where)
    kinds = [(part.get("type"), part.get("num_bits"), part.get("strategy")) for part in (weights, inputs)]
    dynamic = bool(inputs.get("dynamic"))
    if kinds[0] == ("float", 8, "channel") and kinds[1] == ("float", 8, "token") and dynamic:
        algo = QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN
    elif kinds[0] == ("float", 8, "tensor") and kinds[1] == ("float", 8, "token" if dynamic else "tensor"):
        algo = QuantAlgo.FP8
    else:
        raise ConfigError(
            f"{where}: weights and activations are quantized as {kinds} (type, bits, strategy), which cannot be read; "
            f"8-bit float with one scale per tensor, or per channel and token, can: {_REMEDY}"
        )
    kv = _kv_algo(fields.get("kv_cache_scheme"), where)
    return _checked(algo, kv, fields.get("ignore") or (), "dynamic" if dynamic else "static", where)


def weight_block_size(config: dict[str, Any], where: str) -> tuple[int, int] | None:
    """Returns the rows and columns that share a scale in a checkpoint's float8 weights; None: no scales per block.

    Args:
        config: content of config.json.
        where: named in errors.

    Raises:
        ConfigError: they are no two positive numbers.
    """
    described = config.get("quantization_config")
    if not isinstance(described, dict) or described.get("quant_method") != "fp8":
        return None
    block = described.get("weight_block_size")
    if not block:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ConfigError(f"{where}: weight_block_size is {block!r}; it must be two positive whole numbers: {_REMEDY}")
    return block[0], block[1]


def is_mxfp4(config: dict[str, Any]) -> bool:
    """Whether a config.json says that weights beside it are packed as MXFP4."""
    described = config.get("quantization_config")
    return isinstance(described, dict) and described.get("quant_method") == MXFP4


def _from_fp8(fields: dict[str, Any], where: str) -> QuantConfig:
    if weight_block_size({"quantization_config": fields}, where) is not None:
        return QuantConfig(kv_cache_quant_algo=_kv_algo(fields.get("kv_cache_scheme"), where))
    excluded = fields.get("modules_to_not_convert") or fields.get("ignored_layers") or ()
    scheme = fields.get("activation_scheme", "dynamic")
    return _checked(QuantAlgo.FP8, _kv_algo(fields.get("kv_cache_scheme"), where), excluded, scheme, where)


def _checked(algo: Any, kv: Any, excluded: Any, scheme: Any, where: str) -> QuantConfig:
    try:
        patterns = tuple(map(_pattern, excluded)) if isinstance(excluded, (list, tuple)) else excluded
        config = QuantConfig(algo, kv, exclude_modules=patterns, activation_scheme=scheme)
    except ConfigError as error:
        raise ConfigError(
            f"{where}: the weights are quantized in a way that cannot be read: {error}; {_REMEDY}"
        ) from error
    if config.quant_algo is None:
        return replace(config, activation_scheme=None)
    if config.quant_algo not in READABLE:
        raise ConfigError(
            f"{where}: the weights are quantized to {config.quant_algo.value}, which cannot be read; readable: "
            f"{', '.join(algo.value for algo in READABLE)}. Else {_REMEDY}"
        )
    return config


def _pattern(text: Any) -> str:
    """Returns a name pattern; of regular expressions ("re:...") those that only use ``.*`` beside plain names.

    Raises:
        ConfigError: another regular expression, or no text.
    """
    if not isinstance(text, str):
        raise ConfigError(f"a name pattern is {text!r}; it must be text")
    if not text.startswith("re:"):
        return text
    plain = text.removeprefix("re:").removeprefix("^").removesuffix("$").replace(".*", "*").replace("\\.", ".")
    if not re.fullmatch(r"[\w.*-]*", plain):
        raise ConfigError(f"the name pattern {text!r} is a regular expression with more than '.*'")
    return plain if text.endswith("$") else plain + "*"


def _kv_algo(scheme: Any, where: str) -> QuantAlgo | None:
    if not scheme:
        return None
    fields = _object(scheme, "kv_cache_scheme", where)
    if fields.get("type") != "float" or fields.get("num_bits") != 8:
        raise ConfigError(f"{where}: kv_cache_scheme is {scheme!r}; 8-bit float can be read: {_REMEDY}")
    return QuantAlgo.FP8


def _object(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {name} is {value!r}; it must be an object. Copy the file again, or {_REMEDY}")
    return value


def _name(config: QuantConfig) -> str:
    return config.quant_algo.value if config.quant_algo else "no algorithm"
