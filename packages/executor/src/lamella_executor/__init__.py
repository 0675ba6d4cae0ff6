"""Lamella's runtime: in-flight batching over a paged KV cache, from an engine and token ids to token ids.

Names are loaded when first used, so importing this package is fast and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamella_executor.admission import EngineLimits
    from lamella_executor.config import CapacitySchedulerPolicy, KvCacheConfig, SchedulerConfig
    from lamella_executor.executor import GenerationExecutor
    from lamella_executor.request import CompletionOutput, RequestStatus
    from lamella_executor.result import GenerationResult
    from lamella_executor.sampling_params import LogitsProcessor, SamplingParams
    from lamella_executor.sequence import Logprob, TextDecoder
    from lamella_executor.stats import IterationStats, RequestMetrics

_HOMES = {
    "CapacitySchedulerPolicy": "config",
    "CompletionOutput": "request",
    "EngineLimits": "admission",
    "GenerationExecutor": "executor",
    "GenerationResult": "result",
    "IterationStats": "stats",
    "KvCacheConfig": "config",
    "LogitsProcessor": "sampling_params",
    "Logprob": "sequence",
    "RequestMetrics": "stats",
    "RequestStatus": "request",
    "SamplingParams": "sampling_params",
    "SchedulerConfig": "config",
    "TextDecoder": "sequence",
}

__all__ = [
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "EngineLimits",
    "GenerationExecutor",
    "GenerationResult",
    "IterationStats",
    "KvCacheConfig",
    "LogitsProcessor",
    "Logprob",
    "RequestMetrics",
    "RequestStatus",
    "SamplingParams",
    "SchedulerConfig",
    "TextDecoder",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
