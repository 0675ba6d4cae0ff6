"""Which linears of a model its quantization leaves out, by the names of a Hugging Face checkpoint or by our own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella_core.errors import ConfigError

if TYPE_CHECKING:
    from lamella_core.config import ModelConfig

_WEIGHT = ".weight"


def is_excluded(config: ModelConfig, name: str) -> bool:
    """Whether the linear called ``name`` (dotted path in our model) keeps the model's dtype.

    A pattern of ``config.quantization.exclude_modules`` also excludes what is inside a module that it names.

    Raises:
        ConfigError: only some parts of a fused projection are excluded.
    """
    quantization = config.quantization
    if not quantization.exclude_modules:
        return False
    if quantization.is_module_excluded_from_quantization(name):
        return True
    parts = checkpoint_modules(config, name)
    excluded = [any(map(quantization.is_module_excluded_from_quantization, modules)) for modules in parts]
    if any(excluded) and not all(excluded):
        names = ", ".join(sorted(module for modules in parts for module in modules))
        raise ConfigError(
            f"exclude_modules {list(quantization.exclude_modules)} excludes some of {names} and not others; they are "
            "computed in one product: exclude all of them or none"
        )
    return any(excluded)


def checkpoint_modules(config: ModelConfig, name: str) -> list[list[str]]:
    """Returns the names that Hugging Face checkpoints give the parts of a linear: all spellings of each part.

    Of experts, those of the first are named.
    """
    from lamella_core.models.registry import get_model_class

    parts: dict[object, list[str]] = {}
    for rule in get_model_class(config.architecture, config.model_type).WEIGHTS:
        indices = rule.match_target(name + _WEIGHT)
        if indices is not None:
            source = rule.source_name(indices[0], indices[1] or 0)
            parts.setdefault(rule.section, []).append(source.removesuffix(_WEIGHT))
    whole = parts.pop(None, [])
    return [[*names, *whole] for names in parts.values()] or [whole]
