"""The Engine artifact: what a builder makes and an executor runs; JSON and safetensors on disk.

Names load when first used, so that `BuildConfig` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lamella_core.engine.build_config import BuildConfig

if TYPE_CHECKING:
    from lamella_core.engine.engine import Engine
    from lamella_core.engine.spec import EngineSpec
    from lamella_core.engine.writer import EngineWriter

__all__ = ["BuildConfig", "Engine", "EngineSpec", "EngineWriter"]

_LAZY = {"Engine": "engine", "EngineSpec": "spec", "EngineWriter": "writer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
