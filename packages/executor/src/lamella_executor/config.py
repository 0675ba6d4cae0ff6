"""Runtime configuration: KV cache and scheduler. Frozen; what depends on the machine is resolved into return values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lamella_core.errors import ConfigError
from lamella_core.quantization.config import KV_CACHE_DTYPES


class CapacitySchedulerPolicy(str, Enum):
    """When a waiting request may start, given the KV blocks that are free."""

    GUARANTEED_NO_EVICT = (
        "GUARANTEED_NO_EVICT"  # only if its longest possible output fits beside the others': never paused
    )
    MAX_UTILIZATION = (
        "MAX_UTILIZATION"  # as soon as its next chunk fits; under pressure the newest are paused and resumed
    )
    PREDICTED_PEAK = (
        "PREDICTED_PEAK"  # if the blocks of all fit step by step, each ending at its max_tokens; pauses if they do not
    )
    STATIC_BATCH = "STATIC_BATCH"  # a batch is filled, runs until all of it has finished, then the next


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests are admitted and packed into steps."""

    capacity_scheduler_policy: CapacitySchedulerPolicy | None = None  # None: see `policy_for`
    enable_chunked_prefill: bool = True  # False: a prompt is computed in one step and may not exceed max_num_tokens

    def __post_init__(self) -> None:
        _check_flag("SchedulerConfig.enable_chunked_prefill", self.enable_chunked_prefill)
        if self.capacity_scheduler_policy is None:
            return
        try:
            policy = CapacitySchedulerPolicy(self.capacity_scheduler_policy)
        except ValueError:
            raise ConfigError(
                f"SchedulerConfig.capacity_scheduler_policy is {self.capacity_scheduler_policy!r}; "
                f"allowed: {', '.join(p.value for p in CapacitySchedulerPolicy)}"
            ) from None
        object.__setattr__(self, "capacity_scheduler_policy", policy)

    def policy_for(self, device_type: str) -> CapacitySchedulerPolicy:
        """Returns the policy that was chosen, or the default of the device.

        Args:
            device_type: ``torch.device.type``. "cpu": GUARANTEED_NO_EVICT, a paused request costs most there.
                Others: PREDICTED_PEAK, memory bounds how many run at once.
        """
        if self.capacity_scheduler_policy is not None:
            return self.capacity_scheduler_policy
        if device_type == "cpu":
            return CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
        return CapacitySchedulerPolicy.PREDICTED_PEAK


@dataclass(frozen=True)
class KvCacheConfig:
    """Size and behaviour of the paged KV cache. When several size limits are given the smallest wins.

    ``max_attention_window`` limits every layer (or, as a list cycled over the model's layers, each) to its last tokens;
    ``sink_token_length`` keeps that many first tokens visible beside the window (StreamingLLM, Xiao et al. 2023;
    positions stay absolute).
    """

    enable_block_reuse: bool = True  # requests that share a prefix share its blocks
    enable_partial_reuse: bool = True  # the matching head of a block that differs later is copied, not recomputed
    max_tokens: int | None = None  # tokens the cache holds
    free_gpu_memory_fraction: float = 0.9  # of the device memory left after the weights and the largest step
    max_gpu_total_bytes: int | None = None  # of the cache, on a GPU
    gpu_memory_utilization: float | None = None  # of the GPU's memory, for weights, steps and cache together; None: all
    host_memory_bytes: int | None = None  # budget of the cache on a CPU; None: a fraction of the free memory
    tokens_per_block: int | None = None  # None: what the engine was built with
    dtype: str = "auto"  # of keys and values; "fp8": refuse an engine whose cache is not float8
    max_attention_window: int | tuple[int, ...] | None = None
    sink_token_length: int = 0

    def __post_init__(self) -> None:
        for name in ("enable_block_reuse", "enable_partial_reuse"):
            _check_flag(f"KvCacheConfig.{name}", getattr(self, name))
        for name in ("max_tokens", "host_memory_bytes", "max_gpu_total_bytes", "tokens_per_block"):
            value = getattr(self, name)
            if value is not None and not _is_count(value, 1):
                raise ConfigError(f"KvCacheConfig.{name} is {value!r}; it must be a positive integer or None")
        _check_fraction("KvCacheConfig.free_gpu_memory_fraction", self.free_gpu_memory_fraction)
        if self.gpu_memory_utilization is not None:
            _check_fraction("KvCacheConfig.gpu_memory_utilization", self.gpu_memory_utilization)
        if self.dtype not in KV_CACHE_DTYPES:
            raise ConfigError(f"KvCacheConfig.dtype is {self.dtype!r}; allowed: {', '.join(KV_CACHE_DTYPES)}")
        window = self.max_attention_window
        if window is not None:
            windows = tuple(window) if isinstance(window, list | tuple) else (window,)
            if not windows or not all(_is_count(w, 1) for w in windows):
                raise ConfigError(
                    f"KvCacheConfig.max_attention_window is {window!r}; it must be an integer of at least 1, or one "
                    "per layer"
                )
            object.__setattr__(self, "max_attention_window", windows)
        if not _is_count(self.sink_token_length, 0):
            raise ConfigError(f"KvCacheConfig.sink_token_length is {self.sink_token_length!r}; it must be 0 or more")
        if self.sink_token_length and window is None:
            raise ConfigError(
                f"KvCacheConfig.sink_token_length is {self.sink_token_length} without max_attention_window; "
                "sink tokens matter only beside a window: set max_attention_window too"
            )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_fraction(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 < value <= 1.0:
        raise ConfigError(f"{name} is {value!r}; it must be above 0 and at most 1")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be True or False")
