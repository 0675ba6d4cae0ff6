"""Which linears of a model its quantization leaves out, by the names of a Hugging Face checkpoint or by our own."""

from __future__ import annotations

import fnmatch
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
    patterns = config.quantization.exclude_modules
    if not patterns:
        return False
    if _matches(name, patterns):
        return True
    parts = checkpoint_modules(config, name)
    excluded = [any(_matches(module, patterns) for module in modules) for modules in parts]
    if any(excluded) and not all(excluded):
        names = ", ".join(sorted(module for modules in parts for module in modules))
        raise ConfigError(
            f"exclude_modules {list(patterns)} excludes some of {names} and not others; they are computed in one "
            "product: exclude all of them or none"
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


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for p in patterns)
