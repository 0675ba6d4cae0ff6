"""LLM of the older high-level API: translates to `lamella.LLM`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lamella.hlapi.config import KvCacheConfig, ModelConfig, SamplingConfig, StreamingLLMParam
from lamella.llm import LLM as _LLM
from lamella.outputs import RequestOutput
from lamella.prompts import PromptInput
from lamella_core.errors import ConfigError, nearest_name
from lamella_executor import SamplingParams, SchedulerConfig

DEFAULT_MAX_NEW_TOKENS = 32

_OPTIONS = (
    "async_engine_tmp_dir", "async_mode", "capacity_scheduling_policy", "context_chunking_policy",
    "dump_model_processing_summary", "embedding_parallel_mode", "enable_chunked_context", "enable_tokenizer",
    "kvcahe_free_gpu_memory_fraction", "normalize_log_probs", "share_embedding_table",
)  # fmt: skip


class LLM:
    """A model described by a `ModelConfig`; ``generate`` and ``generate_async`` work in every ``async_mode``."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Any = None,
        *,
        dtype: str = "auto",
        kv_cache_config: KvCacheConfig | None = None,
        streaming_llm: bool | StreamingLLMParam = False,
        **options: Any,
    ) -> None:
        """Loads and, if it is not an engine, builds the model.

        Args:
            config: the model.
            tokenizer: default: the model's own; a directory, hub id or object.
            dtype: of weights and activations.
            kv_cache_config: KV cache.
            streaming_llm: True, or its window and sinks.
            **options: of the older releases: ``capacity_scheduling_policy``, ``enable_chunked_context`` and
                ``enable_tokenizer`` act, the others are accepted and have no effect here.

        Raises:
            ConfigError: an unknown option, or one that contradicts the model.
        """
        for name in options:
            if name not in _OPTIONS:
                raise ConfigError(f"LLM got an unexpected option {name!r}{nearest_name(name, _OPTIONS)}")
        self.config = config
        _check_kind("config", config, ModelConfig)
        cache = KvCacheConfig() if kv_cache_config is None else kv_cache_config
        _check_kind("kv_cache_config", cache, KvCacheConfig)
        if options.get("kvcahe_free_gpu_memory_fraction") is not None:
            cache = replace(cache, free_gpu_memory_fraction=options["kvcahe_free_gpu_memory_fraction"])
        self._max_new_tokens = DEFAULT_MAX_NEW_TOKENS if cache.max_new_tokens is None else cache.max_new_tokens
        self._llm = _LLM(
            str(config.model_dir or config.model),
            tokenizer,
            skip_tokenizer_init=not options.get("enable_tokenizer", True),
            dtype=dtype,
            kv_cache_config=cache.to_lamella(_streaming(streaming_llm)),
            scheduler_config=SchedulerConfig(
                capacity_scheduler_policy=options.get("capacity_scheduling_policy"),
                enable_chunked_prefill=options.get("enable_chunked_context", True),
            ),
            **_model_arguments(config),
        )

    @property
    def tokenizer(self) -> Any:
        return self._llm.tokenizer

    def get_default_sampling_config(self) -> SamplingConfig:
        """Returns what ``generate`` uses without a sampling_config: greedy, ending at the model's own end tokens."""
        return SamplingConfig(max_new_tokens=self._max_new_tokens)

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_config: SamplingConfig | Sequence[SamplingConfig] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Generates and waits; one prompt (text or token ids) in, one out. Read ``.text`` and ``.token_ids``."""
        params: Any
        if isinstance(sampling_config, list | tuple):
            params = [self._params(config) for config in sampling_config]
        else:
            params = self._params(sampling_config)
        return self._llm.generate(prompts, params)  # type: ignore[arg-type]

    def generate_async(
        self, prompt: PromptInput, sampling_config: SamplingConfig | None = None, streaming: bool = False
    ) -> RequestOutput:
        """Submits one prompt: ``async for``, ``await out.aresult()`` or ``out.result(timeout=10)``."""
        return self._llm.generate_async(prompt, self._params(sampling_config), streaming)

    def save(self, engine_dir: str | Path) -> None:
        """Writes an engine that ``ModelConfig(engine_dir)`` opens."""
        self._llm.save(engine_dir)

    def shutdown(self) -> None:
        """Stops the engine. Idempotent."""
        self._llm.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _params(self, config: Any) -> SamplingParams:
        if config is None:
            config = self.get_default_sampling_config()
        _check_kind("sampling_config", config, SamplingConfig)
        return config.to_params(self._max_new_tokens)


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        found = f"{type(value).__module__}.{type(value).__name__}"
        raise ConfigError(f"{name} is a {found}; pass a {kind.__module__.rpartition('.')[0]}.{kind.__name__}")


def _streaming(value: bool | StreamingLLMParam) -> StreamingLLMParam | None:
    if isinstance(value, StreamingLLMParam):
        return value
    if not isinstance(value, bool):
        raise ConfigError(f"streaming_llm is {value!r}; pass True, False or a StreamingLLMParam")
    return StreamingLLMParam() if value else None


def _model_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns what `lamella.LLM` takes for the parts of a ModelConfig, directory aside."""
    quant = config.quant_config.to_lamella()
    limits = ("max_beam_width", "max_batch_size", "max_num_tokens", "max_input_len", "max_seq_len")
    return {
        **config.parallel_config.to_arguments(),
        "build_config": config.build_config,
        "quant_config": quant if quant.is_quantized else None,
        **{name: getattr(config, name) for name in limits},
    }
