"""Which class implements an architecture: models register themselves, their files are found by name.

A file ``lamella_core/models/<model_type>.py`` that uses `register` is all it takes to add a model.
"""

from __future__ import annotations

import difflib
import pkgutil
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TypeVar

from lamella_core import models
from lamella_core.errors import ConfigError, UnsupportedModelError
from lamella_core.models.base import CausalLM

M = TypeVar("M", bound=type[CausalLM])

_LEAST_LIKENESS = 0.5  # of two family names, from 0 to 1

_ARCHITECTURES: dict[str, type[CausalLM]] = {}


def register(*architectures: str) -> Callable[[M], M]:
    """Class decorator: the class implements these Hugging Face architecture names.

    Raises:
        ConfigError: another class has the name already.
    """

    def add(cls: M) -> M:
        for name in architectures:
            other = _ARCHITECTURES.setdefault(name, cls)
            if other is not cls:
                raise ConfigError(f"architecture {name!r} is implemented by {other.__module__} and {cls.__module__}")
        cls.architectures = architectures
        return cls

    return add


def _import_all() -> None:
    for module in pkgutil.iter_modules(models.__path__):
        import_module(f"{models.__name__}.{module.name}")


def registered_architectures(task: str | None = None) -> list[str]:
    """Returns the names of all supported architectures, or of those with this `CausalLM.task`, sorted."""
    _import_all()
    return sorted(name for name, cls in _ARCHITECTURES.items() if task in (None, cls.task))


def get_model_class(architecture: str, model_type: str | None = None) -> type[CausalLM]:
    """Returns the class that implements ``architecture``; ``model_type`` saves importing the other models.

    Raises:
        UnsupportedModelError: none does; the message lists the supported ones and the nearest.
        ConfigError: ``model_type`` is that of another supported architecture.
    """
    if architecture not in _ARCHITECTURES and model_type:
        known = {module.name for module in pkgutil.iter_modules(models.__path__)}
        if model_type.replace("-", "_") in known:
            import_module(f"{models.__name__}.{model_type.replace('-', '_')}")
    if architecture not in _ARCHITECTURES:
        supported = registered_architectures()
        if architecture not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"architecture {architecture!r} is not supported; supported: {', '.join(supported)}"
                f"{_nearest(architecture, supported)}"
            )
    model_class = _ARCHITECTURES[architecture]
    if model_type and model_type not in model_class.config_class.hf_model_types:
        _refuse_other_type(architecture, model_type)
    return model_class


def _nearest(architecture: str, supported: Sequence[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the architecture of the likest family name, or an empty string."""

    def likeness(name: str) -> tuple[float, float]:
        pairs = ((_family(architecture), _family(name)), (architecture, name))
        family, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return family, whole

    best = max(supported, key=likeness)
    return f"; did you mean {best!r}?" if likeness(best)[0] >= _LEAST_LIKENESS else ""


def _family(architecture: str) -> str:
    """Returns the part of a name that says whose it is: "gemma2" of "Gemma2ForCausalLM"."""
    return re.split("For[A-Z]|LMHead|Model$", architecture)[0].lower()


def _refuse_other_type(architecture: str, model_type: str) -> None:
    """Lets a model type pass that belongs to no other registered model (derived models have names of their own)."""
    _import_all()
    for name, other in _ARCHITECTURES.items():
        if model_type in other.config_class.hf_model_types:
            raise ConfigError(
                f"architectures names {architecture}, but model_type {model_type!r} is that of {name}; correct the one "
                "in config.json that does not belong to the weights"
            )
