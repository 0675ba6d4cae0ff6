"""Lamella: compile and serve large language models on any machine.

Names are loaded when first used: ``import lamella`` is fast and imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamella.llm import LLM
    from lamella.outputs import BatchError, RequestOutput
    from lamella.scoring import EncodingOutput
    from lamella.tokenizer import TokenizerBase
    from lamella_core.engine import BuildConfig
    from lamella_core.errors import LamellaError, RequestError
    from lamella_core.quantization.config import QuantAlgo, QuantConfig
    from lamella_executor import (
        CapacitySchedulerPolicy,
        CompletionOutput,
        KvCacheConfig,
        SamplingParams,
        SchedulerConfig,
    )

_HOMES = {
    "LLM": "lamella.llm",
    "BatchError": "lamella.outputs",
    "BuildConfig": "lamella_core.engine",
    "CapacitySchedulerPolicy": "lamella_executor",
    "CompletionOutput": "lamella_executor",
    "EncodingOutput": "lamella.scoring",
    "KvCacheConfig": "lamella_executor",
    "LamellaError": "lamella_core.errors",
    "QuantAlgo": "lamella_core.quantization.config",
    "QuantConfig": "lamella_core.quantization.config",
    "RequestError": "lamella_core.errors",
    "RequestOutput": "lamella.outputs",
    "SamplingParams": "lamella_executor",
    "SchedulerConfig": "lamella_executor",
    "TokenizerBase": "lamella.tokenizer",
}

__all__ = [
    "LLM",
    "BatchError",
    "BuildConfig",
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "EncodingOutput",
    "KvCacheConfig",
    "LamellaError",
    "QuantAlgo",
    "QuantConfig",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "TokenizerBase",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("lamella")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
