"""Lamella's compiler: ``build(model, BuildConfig(...)) -> Engine`` and the command ``lamella-build``.

Importing this package does not import torch; the steps of a build load when they run.
"""

from __future__ import annotations

from lamella_builder.build import build
from lamella_core.engine.build_config import BuildConfig

__all__ = ["BuildConfig", "build"]
