"""LlmArgs: every keyword of `LLM`, checked once and frozen."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lamella_builder.sizes import ParallelSizes
from lamella_core.checks import check_number
from lamella_core.config import resolve_dtype
from lamella_core.engine import BuildConfig, Engine
from lamella_core.engine.build_config import DEVICES
from lamella_core.errors import ConfigError, nearest_name
from lamella_core.quantization.config import QuantAlgo, QuantConfig
from lamella_executor import KvCacheConfig, SchedulerConfig

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "dummy")
_BUILD_LIMITS = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_input_len", "max_beam_width")
_FLAGS = ("skip_tokenizer_init", "trust_remote_code", "enable_tqdm")
_CONFIG_TYPES = {
    "kv_cache_config": KvCacheConfig,
    "scheduler_config": SchedulerConfig,
    "build_config": BuildConfig,
    "quant_config": QuantConfig,
}


@dataclass(frozen=True, kw_only=True)
class LlmArgs:
    """Arguments of `LLM`. The ``*_config`` fields also take a dict of the class's fields.

    Raises:
        ConfigError: a value out of range; the message names the field.
    """

    model: str | Path | Engine  # hub id, HF directory, checkpoint, engine directory, or an Engine
    tokenizer: Any = None  # None: the model's own; a directory, hub id or object
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int | None = None  # of these, None is 1, or what the checkpoint or engine was made for
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    # parallelism
    pipeline_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    pp_partition: tuple[int, ...] | list[int] | None = None  # layers of each pipeline stage
    auto_parallel: bool = False  # choose the sizes for world_size ranks
    world_size: int | None = None  # with auto_parallel; None: one rank for each GPU of this machine
    gpus_per_node: int | None = None  # None: the GPUs of this machine
    worker_timeout_s: float = 30.0  # after which the silent process of another rank counts as dead
    # loading and building
    device: str = "auto"  # "cpu", "cuda", or a GPU if there is one; overrides the field of build_config
    load_format: str = "auto"  # "dummy": random weights from config.json alone
    build_config: BuildConfig | None = None
    quant_config: QuantConfig | None = None
    enable_tqdm: bool = False  # show the steps of building
    # limits; each overrides the field of build_config
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    max_input_len: int | None = None
    max_beam_width: int | None = None
    # runtime
    attn_backend: str = "auto"  # on a GPU: "triton", "flashinfer" or "torch"
    kv_cache_config: KvCacheConfig | None = None
    scheduler_config: SchedulerConfig | None = None
    enable_chunked_prefill: bool | None = None  # overrides the field of scheduler_config
    max_stats_len: int = 1000  # iterations that get_stats remembers

    def __post_init__(self) -> None:
        if isinstance(self.model, bytes) or not isinstance(self.model, str | os.PathLike | Engine):
            raise ConfigError(f"model is {type(self.model).__name__}; pass a directory, a hub id or an Engine")
        if not str(self.model):
            raise ConfigError("model is empty; pass a directory or a hub id such as 'org/name'")
        if self.load_format not in LOAD_FORMATS:
            raise ConfigError(f"load_format is {self.load_format!r}; allowed: {', '.join(LOAD_FORMATS)}")
        if self.device not in DEVICES:
            raise ConfigError(f"device is {self.device!r}; allowed: {', '.join(DEVICES)}")
        resolve_dtype(self.dtype)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        for name in _BUILD_LIMITS + ("max_stats_len",):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a positive integer or None")
        for name, kind in _CONFIG_TYPES.items():
            object.__setattr__(self, name, _as_config(name, getattr(self, name), kind))
        self.sizes()
        check_number("worker_timeout_s", self.worker_timeout_s, positive=True)
        if self.skip_tokenizer_init and self.tokenizer is not None:
            raise ConfigError("skip_tokenizer_init=True and tokenizer= contradict each other; drop one of them")
        if self.trust_remote_code:
            logger.warning("trust_remote_code=True has no effect: code of a model repository is never run")

    def sizes(self) -> ParallelSizes:
        """Returns the ranks that are asked for.

        Raises:
            ConfigError: sizes that contradict each other.
        """
        partition = self.pp_partition
        return ParallelSizes(
            tp_size=self.tensor_parallel_size,
            pp_size=self.pipeline_parallel_size,
            moe_tp_size=self.moe_tensor_parallel_size,
            moe_ep_size=self.moe_expert_parallel_size,
            pp_partition=tuple(partition) if isinstance(partition, list) else partition,
            auto_parallel=self.auto_parallel,
            world_size=self.world_size,
            gpus_per_node=self.gpus_per_node,
            long_names=True,
        )

    @classmethod
    def create(cls, **values: Any) -> LlmArgs:
        """Returns the arguments.

        Raises:
            ConfigError: an unknown keyword (the message names the nearest known one) or a bad value.
        """
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(
                f"LLM got an unexpected keyword argument {unknown[0]!r}{nearest_name(unknown[0], known)}. "
                f"Known: {', '.join(known)}"
            )
        return cls(**values)

    def resolved_build_config(self) -> BuildConfig:
        """Returns ``build_config`` with the device and the limits that were given as keywords.

        Without a build_config no kernels are timed: loading is quick, and loading twice gives the same text twice.
        """
        changes: dict[str, Any] = {
            name: getattr(self, name) for name in _BUILD_LIMITS if getattr(self, name) is not None
        }
        if self.device != "auto":
            changes["device"] = self.device
        return replace(self.build_config or BuildConfig(kernel_selection="default"), **changes)

    def resolved_quant_config(self) -> QuantConfig | None:
        """Returns ``quant_config``, with a float8 KV cache if ``kv_cache_config.dtype`` asks for one."""
        if self.kv_cache_config is None or self.kv_cache_config.dtype != "fp8":
            return self.quant_config
        return replace(self.quant_config or QuantConfig(), kv_cache_quant_algo=QuantAlgo.FP8)

    def resolved_scheduler_config(self) -> SchedulerConfig:
        """Returns ``scheduler_config`` with ``enable_chunked_prefill`` if that was given."""
        config = self.scheduler_config or SchedulerConfig()
        if self.enable_chunked_prefill is None:
            return config
        return replace(config, enable_chunked_prefill=self.enable_chunked_prefill)


def _as_config(name: str, value: Any, kind: Any) -> Any:
    """Returns ``value`` as an instance of ``kind`` or None."""
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {type(value).__name__}; pass a {kind.__name__} or a dict of its fields")
    known = [f.name for f in fields(kind)]
    for key in value:
        if key not in known:
            raise ConfigError(f"{name} has no field {key!r}{nearest_name(str(key), known)}")
    return kind(**value)
