"""BenchPlan: what to measure, the defaults that suit the device, and the `LLM` that it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from lamella.llm import LLM
from lamella_core.checkpoint.formats import ENGINE_FILE
from lamella_core.device import resolve_device
from lamella_core.engine import BuildConfig
from lamella_core.errors import ConfigError
from lamella_core.quantization.config import parse_options
from lamella_executor import KvCacheConfig, SamplingParams

T = TypeVar("T")

STATS_LEN = 1 << 14  # steps that are remembered; a run of more is described by its last ones

_GPU_BATCH_SIZE = 2048  # products are bound by arithmetic long before, and longer steps hide more of the host
_GPU_NUM_TOKENS = 8192
_GPU_WARMUP = 256  # requests: enough to meet the kernels of large batches and full prompt chunks
_WARMUP_OSL = 32


@dataclass(frozen=True)
class BenchPlan:
    """What to measure. Fields that are None get a default that suits the device, see `resolved`."""

    mode: str  # "throughput" | "latency"
    model: str
    load_format: str
    dtype: str
    isl: int  # prompt tokens
    osl: int  # generated tokens
    num_requests: int  # latency: runs of ``concurrency`` requests each
    concurrency: int  # requests in flight
    config_only: bool = False  # the model is a config.json; the limits may follow the workload
    quant: str | None = None  # name of a QuantAlgo
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    warmup: int | None = None  # requests before the clock starts; latency: runs
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    scheduler_policy: str | None = None
    tokens_per_block: int | None = None
    free_gpu_memory_fraction: float | None = None
    gpu_memory_utilization: float | None = None
    attn_backend: str = "auto"
    kernel_selection: str | None = None  # "timed" | "default"
    sizes: dict[str, Any] = field(default_factory=dict)  # arguments of `LLM` that spread the model over ranks
    seed: int = 0
    breakdown: bool = True

    def resolved(self) -> BenchPlan:
        """Returns the plan with a known device, and with defaults for large batches if that is a GPU.

        An engine keeps its own limits.

        Raises:
            ConfigError: a GPU is asked for and there is none, an unknown name, or requests longer than max_seq_len.
        """
        parse_options(self.quant, self.kv_cache_dtype)
        self.check_fits(self.max_seq_len)
        if self._is_engine:
            return replace(self, warmup=_given(self.warmup, 1))
        on_gpu = resolve_device(self.device) == "cuda"
        is_latency = self.mode == "latency"
        batch = min(_GPU_BATCH_SIZE, self.concurrency) if on_gpu else None
        return replace(
            self,
            device="cuda" if on_gpu else "cpu",
            warmup=_given(self.warmup, 1 if is_latency or not on_gpu else min(self.num_requests, _GPU_WARMUP)),
            max_batch_size=_given(self.max_batch_size, batch),
            max_num_tokens=_given(self.max_num_tokens, _GPU_NUM_TOKENS if on_gpu else None),
            max_seq_len=_given(self.max_seq_len, self.isl + self.osl if self.config_only else None),
            kernel_selection=_given(self.kernel_selection, "timed" if on_gpu else "default"),
        )

    def check_fits(self, max_seq_len: int | None) -> None:
        """Refuses requests that would end early, cut off at ``max_seq_len`` tokens (None: not known yet).

        Raises:
            ConfigError: isl + osl exceed it.
        """
        if max_seq_len is None or self.isl + self.osl <= max_seq_len:
            return
        if self.max_seq_len is not None:
            more = "raise --max-seq-len"
        elif self._is_engine:
            more = "build the engine with a larger max_seq_len"
        else:
            more = "measure a model with more positions"
        raise ConfigError(
            f"isl {self.isl} + osl {self.osl} = {self.isl + self.osl} tokens do not fit max_seq_len {max_seq_len}; "
            f"lower --isl or --osl, or {more}"
        )

    @property
    def _is_engine(self) -> bool:
        return (Path(self.model) / ENGINE_FILE).is_file()

    @property
    def params(self) -> SamplingParams:
        """Greedy, to the full length."""
        return SamplingParams(max_tokens=self.osl, ignore_eos=True)

    @property
    def warmup_params(self) -> SamplingParams:
        return SamplingParams(max_tokens=min(self.osl, _WARMUP_OSL), ignore_eos=True)

    def open(self) -> LLM:
        """Builds or loads the model of a resolved plan and starts serving it, without a tokenizer or prefix reuse.

        Raises:
            ConfigError: options that contradict each other, the model or the engine.
            OutOfMemoryError: weights and KV cache do not fit.
        """
        policy = self.scheduler_policy
        return LLM(
            self.model,
            skip_tokenizer_init=True,
            load_format=self.load_format,
            dtype=self.dtype,
            device=self.device,
            max_batch_size=self.max_batch_size,
            max_num_tokens=self.max_num_tokens,
            max_seq_len=self.max_seq_len,
            build_config=self._build_config(),
            quant_config=parse_options(self.quant, self.kv_cache_dtype),
            kv_cache_config=self._kv_cache_config(),
            scheduler_config={"capacity_scheduler_policy": policy.upper()} if policy else None,
            attn_backend=self.attn_backend,
            max_stats_len=STATS_LEN,
            **self.sizes,
        )

    def _build_config(self) -> BuildConfig | None:
        return BuildConfig(kernel_selection=self.kernel_selection) if self.kernel_selection else None

    def _kv_cache_config(self) -> KvCacheConfig:
        config = KvCacheConfig(
            enable_block_reuse=False,
            tokens_per_block=self.tokens_per_block,
            gpu_memory_utilization=self.gpu_memory_utilization,
        )
        fraction = self.free_gpu_memory_fraction
        return config if fraction is None else replace(config, free_gpu_memory_fraction=fraction)


def _given(value: T | None, default: T | None) -> T | None:
    return default if value is None else value
