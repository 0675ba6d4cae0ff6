"""BuildConfig: the limits an engine is built for; written by the builder, kept by the executor."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lamella_core.checks import check_integer
from lamella_core.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from lamella_core.config import ModelConfig

KV_CACHE_TYPES = ("paged", "continuous", "disabled")
KERNEL_SELECTIONS = ("timed", "default")
DEVICES = ("auto", "cpu", "cuda")

T = TypeVar("T")


def _reject_unknown_keywords(cls: type[T]) -> type[T]:
    """Class decorator: an unknown keyword raises `ConfigError` with the nearest known name."""
    init = cls.__init__
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                hint = nearest_name(name, known) or f"; known: {', '.join(known)}"
                raise ConfigError(f"{cls.__name__} has no field {name!r}{hint}")
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


@_reject_unknown_keywords
@dataclass(frozen=True)
class BuildConfig:
    """Limits and choices of a build. ``None`` means: derived from the model by `resolved`.

    Attributes:
        max_batch_size: requests that run in one step.
        max_num_tokens: tokens (of prompts and of decoding requests together) computed in one step.
        max_seq_len: tokens of one request, prompt and output together; None: the model's own limit.
        max_beam_width: beams (or samples) that one request may hold.
        max_input_len: tokens of one prompt; None: ``max_seq_len - 1``.
        kv_cache_type: "paged" (blocks of ``tokens_per_block``), "continuous" (one block of ``max_seq_len`` per
            sequence) or "disabled" (prompts only, nothing is generated).
        tokens_per_block: tokens of a paged KV block, a power of two.
        opt_num_tokens: step size in tokens that kernels are chosen for beside single-token decoding and long prompts;
            None: ``max_batch_size * max_beam_width``.
        dtype: of the weights in the engine; None: the model's.
        device: where the engine runs: "cpu", "cuda", or "auto": an NVIDIA GPU of compute capability 8.0 or more if
            this machine has one, else the CPU. In an engine it is resolved.
        kernel_selection: "timed" times the candidates on this machine, "default" takes the usual choice at once.
        gather_context_logits: read by ported scripts; every engine can return prompt logits.
        gather_generation_logits: read by ported scripts; every engine can return the logits of generated tokens.

    Raises:
        ConfigError: an unknown field, or a value out of range.
    """

    max_batch_size: int = 64
    max_num_tokens: int = 2048
    max_seq_len: int | None = None
    max_beam_width: int = 1
    max_input_len: int | None = None
    kv_cache_type: str = "paged"
    tokens_per_block: int = 32
    opt_num_tokens: int | None = None
    dtype: str | None = None
    device: str = "auto"
    kernel_selection: str = "timed"
    gather_context_logits: bool = False
    gather_generation_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_num_tokens", "max_beam_width", "tokens_per_block"):
            check_integer(f"BuildConfig.{name}", getattr(self, name), 1)
        for name, least in (("max_seq_len", 2), ("max_input_len", 1), ("opt_num_tokens", 1)):
            if getattr(self, name) is not None:
                check_integer(f"BuildConfig.{name}", getattr(self, name), least)
        object.__setattr__(self, "kv_cache_type", str(getattr(self.kv_cache_type, "value", self.kv_cache_type)).lower())
        _check_choice("kv_cache_type", self.kv_cache_type, KV_CACHE_TYPES)
        _check_choice("kernel_selection", self.kernel_selection, KERNEL_SELECTIONS)
        _check_choice("device", self.device, DEVICES)
        if self.tokens_per_block & (self.tokens_per_block - 1):
            raise ConfigError(f"BuildConfig.tokens_per_block is {self.tokens_per_block}; it must be a power of two")
        if self.max_beam_width > self.max_num_tokens:
            raise ConfigError(
                f"BuildConfig.max_beam_width {self.max_beam_width} exceeds max_num_tokens {self.max_num_tokens}: the "
                "beams of a request advance in the same step; raise max_num_tokens"
            )

    def resolved(self, model: ModelConfig) -> BuildConfig:
        """Returns the configuration with every limit filled in for ``model``.

        Raises:
            ConfigError: a limit that the model or another limit rules out.
        """
        from lamella_core.config import resolve_dtype  # imports torch: constructing a BuildConfig does not
        from lamella_core.device import resolve_device

        seq_len = model.max_position_embeddings if self.max_seq_len is None else self.max_seq_len
        if seq_len > model.num_positions:
            raise ConfigError(
                f"BuildConfig.max_seq_len {seq_len} exceeds the model's {model.num_positions} positions "
                "(max_position_embeddings); "
                "lower it, or load the model with a rope scaling that reaches further"
            )
        input_len = max(1, seq_len - 1) if self.max_input_len is None else self.max_input_len
        if input_len > seq_len:
            raise ConfigError(f"BuildConfig.max_input_len {input_len} exceeds max_seq_len {seq_len}; lower it")
        opt = min(self.max_num_tokens, self.opt_num_tokens or self.max_batch_size * self.max_beam_width)
        dtype = resolve_dtype(self.dtype, model.dtype)
        device = resolve_device(self.device)
        return replace(
            self, max_seq_len=seq_len, max_input_len=input_len, opt_num_tokens=opt, dtype=dtype, device=device
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BuildConfig:
        """Inverse of `to_dict`; absent fields take their defaults.

        Raises:
            ConfigError: an unknown field, or a value out of range.
        """
        return cls(**data)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"BuildConfig.{name} is {value!r}; allowed: {', '.join(allowed)}{nearest_name(value, allowed)}"
        )
