"""lamella_core: configurations, parallel layers, models, checkpoints, quantization and the Engine artifact.

Names are imported when first used: importing the package loads neither torch nor any model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamella_core.auto import AutoConfig, AutoModelForCausalLM
    from lamella_core.config import ModelConfig
    from lamella_core.engine import BuildConfig, Engine
    from lamella_core.errors import (
        CheckpointError,
        ConfigError,
        EngineDeadError,
        EngineFormatError,
        LamellaError,
        OutOfMemoryError,
        RequestError,
        StepError,
        UnsupportedModelError,
    )
    from lamella_core.mapping import Mapping
    from lamella_core.models.gpt2 import GPT2LMHeadModel
    from lamella_core.models.gpt2 import GPT2LMHeadModel as GPTForCausalLM
    from lamella_core.models.llama import LlamaForCausalLM
    from lamella_core.models.llama import LlamaForCausalLM as LLaMAForCausalLM
    from lamella_core.models.mistral import MistralForCausalLM
    from lamella_core.models.mixtral import MixtralForCausalLM
    from lamella_core.models.qwen2 import Qwen2ForCausalLM
    from lamella_core.models.qwen2 import Qwen2ForCausalLM as QWenForCausalLM
    from lamella_core.quantization.config import QuantAlgo, QuantConfig

__version__ = "0.1.0"

# Public name -> module, or module:name where the name differs there.
_HOME = {
    "AutoConfig": "auto",
    "AutoModelForCausalLM": "auto",
    "BuildConfig": "engine",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Engine": "engine",
    "EngineDeadError": "errors",
    "EngineFormatError": "errors",
    "GPT2LMHeadModel": "models.gpt2",
    "GPTForCausalLM": "models.gpt2:GPT2LMHeadModel",
    "LLaMAForCausalLM": "models.llama:LlamaForCausalLM",
    "LamellaError": "errors",
    "LlamaForCausalLM": "models.llama",
    "Mapping": "mapping",
    "MistralForCausalLM": "models.mistral",
    "MixtralForCausalLM": "models.mixtral",
    "ModelConfig": "config",
    "OutOfMemoryError": "errors",
    "QWenForCausalLM": "models.qwen2:Qwen2ForCausalLM",
    "QuantAlgo": "quantization.config",
    "QuantConfig": "quantization.config",
    "Qwen2ForCausalLM": "models.qwen2",
    "RequestError": "errors",
    "StepError": "errors",
    "UnsupportedModelError": "errors",
}

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "BuildConfig",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "EngineDeadError",
    "EngineFormatError",
    "GPT2LMHeadModel",
    "GPTForCausalLM",
    "LLaMAForCausalLM",
    "LamellaError",
    "LlamaForCausalLM",
    "Mapping",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "ModelConfig",
    "OutOfMemoryError",
    "QWenForCausalLM",
    "QuantAlgo",
    "QuantConfig",
    "Qwen2ForCausalLM",
    "RequestError",
    "StepError",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lamella_core' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(f"lamella_core.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
