"""Configurations of the older high-level API. Mutable, as they were then; `LLM` checks and freezes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lamella_core.engine import BuildConfig
from lamella_core.errors import ConfigError, nearest_name
from lamella_core.quantization.config import QuantAlgo
from lamella_core.quantization.config import QuantConfig as _QuantConfig
from lamella_executor import KvCacheConfig as _KvCacheConfig
from lamella_executor import SamplingParams


class ParallelConfig:
    """How many devices a model runs on: ``tp_size`` x ``pp_size``.

    With ``auto_parallel`` both are chosen for ``world_size`` devices; only then can ``world_size`` be set.
    """

    def __init__(
        self, tp_size: int = 1, pp_size: int = 1, auto_parallel: bool = False, devices: Sequence[int] | None = None
    ) -> None:
        self.tp_size = tp_size
        self.pp_size = pp_size
        self.auto_parallel = auto_parallel
        self._world_size: int | None = None
        self._devices = list(devices) if devices is not None else None

    @property
    def world_size(self) -> int:
        if self._world_size is not None and self.auto_parallel:
            return self._world_size
        return self.tp_size * self.pp_size

    @world_size.setter
    def world_size(self, value: int) -> None:
        if not self.auto_parallel:
            raise ConfigError(
                f"ParallelConfig.world_size follows from tp_size {self.tp_size} and pp_size {self.pp_size}; set those, "
                "or set auto_parallel=True first"
            )
        if self.tp_size > 1 or self.pp_size > 1:
            raise ConfigError(
                f"ParallelConfig.world_size cannot be set beside tp_size {self.tp_size} and pp_size {self.pp_size}; "
                "auto_parallel chooses them: leave both at 1"
            )
        self._world_size = value

    def to_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `lamella.LLM`; sizes of 1 say nothing, as engines have their own."""
        return {
            "tensor_parallel_size": self.tp_size if self.tp_size != 1 else None,
            "pipeline_parallel_size": self.pp_size if self.pp_size != 1 else None,
            "auto_parallel": self.auto_parallel,
            "world_size": self._world_size if self.auto_parallel else None,
        }

    @property
    def devices(self) -> list[int]:
        return self._devices if self._devices is not None else list(range(self.world_size))

    @devices.setter
    def devices(self, value: Sequence[int]) -> None:
        if len(value) != self.world_size:
            raise ConfigError(f"ParallelConfig.devices has {len(value)} entries; world_size is {self.world_size}")
        self._devices = list(value)

    @property
    def is_multi_gpu(self) -> bool:
        return self.world_size > 1


@dataclass
class QuantConfig:
    """How to quantize; see `lamella.QuantConfig`."""

    quant_algo: QuantAlgo | str | None = None
    kv_cache_quant_algo: QuantAlgo | str | None = None
    group_size: int = 128
    has_zero_point: bool = False
    exclude_modules: Sequence[str] = ()

    def set_fp8_qdq(self) -> None:
        """Quantizes weights and activations to FP8."""
        self.quant_algo = QuantAlgo.FP8

    def set_fp8_kv_cache(self) -> None:
        """Quantizes the KV cache to FP8."""
        self.kv_cache_quant_algo = QuantAlgo.FP8

    def to_lamella(self) -> _QuantConfig:
        """Returns the checked, frozen configuration."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _QuantConfig(**{**values, "exclude_modules": tuple(self.exclude_modules)})


@dataclass
class KvCacheConfig:
    """Size and behaviour of the KV cache; ``max_new_tokens`` is the default output length of a request."""

    max_tokens: int | None = None
    max_new_tokens: int | None = None
    free_gpu_memory_fraction: float = 0.9
    enable_block_reuse: bool = False
    max_attention_window: int | Sequence[int] | None = None
    sink_token_length: int | None = None
    tokens_per_block: int | None = None
    host_memory_bytes: int | None = None

    def to_lamella(self, streaming_llm: StreamingLLMParam | None) -> _KvCacheConfig:
        """Returns the checked, frozen configuration; ``streaming_llm`` sets the window and turns block reuse off."""
        window, sinks = self.max_attention_window, self.sink_token_length or 0
        if streaming_llm is not None:
            window, sinks = streaming_llm.max_attention_window_size, streaming_llm.sink_token_length
        return _KvCacheConfig(
            enable_block_reuse=self.enable_block_reuse and streaming_llm is None,
            max_tokens=self.max_tokens,
            free_gpu_memory_fraction=self.free_gpu_memory_fraction,
            host_memory_bytes=self.host_memory_bytes,
            tokens_per_block=self.tokens_per_block,
            max_attention_window=window if window is None or isinstance(window, int) else tuple(window),
            sink_token_length=sinks,
        )


@dataclass
class StreamingLLMParam:
    """Generation without end: each token sees the first ``sink_token_length`` and the last tokens of a window."""

    max_attention_window_size: int = 2048
    sink_token_length: int = 4


@dataclass
class ModelConfig:
    """Which model to run and how: exactly one of ``model_dir`` (HF directory, checkpoint or engine) and ``model``.

    Raises:
        ConfigError: both or neither is given, or the directory does not exist.
    """

    model_dir: str | Path | None = None
    model: str | None = None  # hub id
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    build_config: BuildConfig | None = None
    max_beam_width: int | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None

    def __post_init__(self) -> None:
        if (self.model_dir is None) == (self.model is None):
            raise ConfigError("ModelConfig takes either model_dir (a local directory) or model (a hub id)")
        if self.model_dir is not None and not Path(self.model_dir).is_dir():
            raise ConfigError(f"ModelConfig.model_dir is {str(self.model_dir)!r}, which is not a directory")


class SamplingConfig:
    """How to generate. ``num_beams`` is another name of ``beam_width``; above 1 it means beam search.

    Raises:
        ConfigError: an unknown field.
    """

    _DEFAULTS: dict[str, Any] = {
        "end_id": None, "pad_id": None, "max_new_tokens": None, "min_length": 0, "beam_width": 1,
        "num_return_sequences": None, "temperature": None, "top_k": None, "top_p": None, "length_penalty": 1.0,
        "early_stopping": False, "beam_search_diversity_rate": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "no_repeat_ngram_size": 0, "random_seed": None, "stop_words": None, "bad_words": None,
        "return_log_probs": False,
    }  # fmt: skip
    _ALIASES = {"num_beams": "beam_width", "seed": "random_seed", "max_tokens": "max_new_tokens"}

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(self._DEFAULTS)
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        name = self._ALIASES.get(name, name)
        if name not in self._DEFAULTS:
            raise ConfigError(f"SamplingConfig has no field {name!r}{nearest_name(name, self._DEFAULTS)}")
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in self._ALIASES:
            return self.__dict__[self._ALIASES[name]]
        raise AttributeError(f"SamplingConfig has no field {name!r}{nearest_name(name, self._DEFAULTS)}")

    def __repr__(self) -> str:
        changed = {k: v for k, v in self.__dict__.items() if v != self._DEFAULTS[k]}
        return f"SamplingConfig({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def to_params(self, default_max_new_tokens: int) -> SamplingParams:
        """Returns the same request as `SamplingParams`.

        Raises:
            RequestError: a value out of range.
        """
        v = self.__dict__
        names = ("end_id", "pad_id", "length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty",
                 "no_repeat_ngram_size")  # fmt: skip
        params: dict[str, Any] = {name: v[name] for name in names}
        params["max_tokens"] = v["max_new_tokens"] if v["max_new_tokens"] is not None else default_max_new_tokens
        params.update(min_tokens=v["min_length"], seed=v["random_seed"], stop=v["stop_words"], bad=v["bad_words"])
        params["logprobs"] = 0 if v["return_log_probs"] else None
        if v["beam_width"] != 1:
            params.update(use_beam_search=True, best_of=v["beam_width"], early_stopping=v["early_stopping"],
                          beam_search_diversity_rate=v["beam_search_diversity_rate"])  # fmt: skip
            params["n"] = v["num_return_sequences"] or v["beam_width"]
        else:
            params.update(temperature=v["temperature"], top_k=v["top_k"], top_p=v["top_p"] or None)
            params["n"] = v["num_return_sequences"] or 1
        return SamplingParams(**params)
