"""The older high-level API, as a thin adapter: scripts written for it run with only the import changed.

``ModelConfig`` describes the model, ``LLM(config)`` runs it, ``SamplingConfig`` says how to generate. Everything is
translated to `lamella.LLM`; new code should use that directly.
"""

from __future__ import annotations

from lamella.hlapi.config import (
    KvCacheConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    SamplingConfig,
    StreamingLLMParam,
)
from lamella.hlapi.llm import LLM
from lamella_core.engine import BuildConfig
from lamella_core.quantization.config import QuantAlgo
from lamella_executor import CapacitySchedulerPolicy

__all__ = [
    "LLM",
    "BuildConfig",
    "CapacitySchedulerPolicy",
    "KvCacheConfig",
    "ModelConfig",
    "ParallelConfig",
    "QuantAlgo",
    "QuantConfig",
    "SamplingConfig",
    "StreamingLLMParam",
]
