"""The memory plan of an engine, made from a configuration alone before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lamella_builder.steps.kernels import COLD_BYTES
from lamella_core.config import DTYPES, ModelConfig
from lamella_core.device import free_gpu_bytes
from lamella_core.engine.build_config import BuildConfig
from lamella_core.errors import OutOfMemoryError
from lamella_core.host_memory import available_bytes
from lamella_core.models.registry import get_model_class

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM

_BASE_BYTES = 300 << 20  # the interpreter, torch and its threads
_GPU_BASE_BYTES = 1 << 30  # libraries, their workspaces, recorded steps
_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """What building and running an engine takes. Bytes are of one rank where not said otherwise.

    On a CPU all ranks are taken to run on this machine; on GPUs each has one like this machine's to itself.

    Attributes:
        weight_bytes: weights of each planned rank, in rank order.
        largest_weight_bytes: the largest parameter of any rank, held twice while it is laid out.
        kv_bytes_per_token: keys and values of all layers of the rank that holds most.
        kv_tokens_wanted: tokens that fill every limit: max_batch_size x max_beam_width x max_seq_len.
        kv_tokens_least: tokens of one request of max_seq_len with all its beams; of one block when max_seq_len is only
            the model's own limit, which shorter requests need not reach.
        activation_bytes: estimate of the largest step's intermediate tensors.
        available_bytes: free memory of this machine, or of its GPU, now.
        loaded_bytes: weights that are in that memory already.
        device: "cpu" or "cuda", whose memory this is about.
        total_bytes: memory of the GPU.
        world_size: ranks of the model, planned or not.
    """

    weight_bytes: tuple[int, ...]
    largest_weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens_wanted: int
    kv_tokens_least: int
    activation_bytes: int
    available_bytes: int
    loaded_bytes: int = 0
    device: str = "cpu"
    total_bytes: int = 0
    world_size: int = 1

    @property
    def base_bytes(self) -> int:
        """What a process takes without a model."""
        return base_bytes(self.device)

    @property
    def build_bytes(self) -> int:
        """Peak of building, one rank after another."""
        if self.device == "cuda":  # kernels are timed with the model's own weights
            return max(self.weight_bytes) + self.largest_weight_bytes + self.base_bytes
        timing = 3 * max(self.largest_weight_bytes, COLD_BYTES)  # copies of one weight in the layouts compared
        return max(self.weight_bytes) + timing + self.base_bytes

    @property
    def _shares(self) -> tuple[int, int]:
        """Weights, and number of ranks, that one memory has to hold."""
        if self.device == "cuda":
            return max(self.weight_bytes), 1
        return sum(self.weight_bytes), len(self.weight_bytes)

    @property
    def run_bytes(self) -> int:
        """The least that running takes of this machine, or of each GPU: weights, one step, one full request."""
        weights, ranks = self._shares
        per_rank = self.activation_bytes + self.kv_tokens_least * self.kv_bytes_per_token + self.base_bytes
        return weights + per_rank * ranks

    @property
    def kv_tokens_that_fit(self) -> int:
        """Tokens whose keys and values fit in what weights and one step leave free."""
        weights, ranks = self._shares
        fixed = weights + (self.activation_bytes + self.base_bytes) * ranks
        left = self.available_bytes + self.loaded_bytes - fixed
        return max(0, left // max(1, self.kv_bytes_per_token * ranks))

    def check(self) -> None:
        """Refuses what cannot work on this machine; whether several ranks on CPUs fit depends on where they will run.

        Raises:
            OutOfMemoryError: building, or serving one request of max_seq_len, needs more than there is.
        """
        free, size = self.available_bytes + self.loaded_bytes, format_bytes
        where, instead = "", ""
        if self.device == "cuda":
            where = f" of the GPU's {size(self.total_bytes)}"
            instead = ", end other processes on the GPU, or build for the CPU (device='cpu')"
        if self.build_bytes > free:
            raise OutOfMemoryError(
                f"building takes {size(self.build_bytes)} (one rank's weights are {size(max(self.weight_bytes))}), "
                f"{size(free)}{where} are free; choose a smaller dtype, raise tp_size or pp_size, or free memory"
                f"{instead}"
            )
        if (self.world_size == 1 or self.device == "cuda") and self.run_bytes > free:
            kv = self.kv_tokens_least * self.kv_bytes_per_token
            raise OutOfMemoryError(
                f"running takes at least {size(self.run_bytes)}: weights {size(self._shares[0])}, one step "
                f"{size(self.activation_bytes)}, keys and values of one request {size(kv)}; {size(free)}{where} are "
                "free. Lower max_seq_len or max_beam_width (keys and values), max_num_tokens or max_batch_size (step), "
                f"or choose a smaller dtype{instead}"
            )


def plan_memory(
    config: ModelConfig, build: BuildConfig, *, loaded_bytes: int = 0, ranks: Sequence[int] | None = None
) -> MemoryPlan:
    """Returns the memory plan for the ranks of ``config.mapping``.

    Args:
        config: the model, from any rank.
        build: limits as the user gave them.
        loaded_bytes: weights that are in the device's memory already.
        ranks: those to plan for; None: all.

    Raises:
        ConfigError: limits that the model rules out.
    """
    wants_whole = build.max_seq_len is not None
    build = build.resolved(config)
    model_class = get_model_class(config.architecture, config.model_type)
    config = replace(config, dtype=build.dtype or config.dtype)
    models = [
        model_class.empty(config.with_mapping(config.mapping.with_rank(rank)), build.device)
        for rank in (range(config.mapping.world_size) if ranks is None else ranks)
    ]
    seq_len = build.max_seq_len or config.max_position_embeddings
    least = _resident_tokens(models, seq_len) if wants_whole else build.tokens_per_block
    sequences = build.max_batch_size * build.max_beam_width
    free, total = free_gpu_bytes() if build.device == "cuda" else (available_bytes(), 0)
    return MemoryPlan(
        weight_bytes=tuple(model.weight_bytes() for model in models),
        largest_weight_bytes=max(p.nbytes for model in models for p in model.parameters()),
        kv_bytes_per_token=0
        if build.kv_cache_type == "disabled"
        else max(kv_bytes_per_token(model, build.device) for model in models),
        kv_tokens_wanted=sequences * seq_len,
        kv_tokens_least=least * build.max_beam_width,
        activation_bytes=activation_bytes(config, build),
        available_bytes=free,
        loaded_bytes=loaded_bytes,
        device=build.device,
        total_bytes=total,
        world_size=config.mapping.world_size,
    )


def kv_bytes_per_token(model: CausalLM, device: str = "cpu") -> int:
    """Returns the bytes that one token's keys and values take in all layers of the model's rank.

    They have the model's dtype; on a GPU a float8 cache takes a byte for each number.
    """
    numbers = sum(spec.cache_width for spec in model.attention_specs())
    is_float8 = device == "cuda" and model.config.quantization.kv_cache_quant_algo is not None
    return numbers * (1 if is_float8 else model.config.torch_dtype.itemsize)


def base_bytes(device: str) -> int:
    """Returns what a process takes on "cpu" or "cuda" without a model."""
    return _GPU_BASE_BYTES if device == "cuda" else _BASE_BYTES


def _resident_tokens(models: list[CausalLM], max_seq_len: int) -> int:
    windows = [spec.sliding_window or max_seq_len for model in models for spec in model.attention_specs()]
    return min(max_seq_len, max(windows, default=max_seq_len))


def activation_bytes(config: ModelConfig, build: BuildConfig) -> int:
    """Returns an estimate of one step's peak: residual, normed input, QKV, attention and MLP intermediates, logits."""
    tp = config.mapping.tp_size
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    per_token = 3 * config.hidden_size + max(2 * heads * config.head_dim, 3 * config.intermediate_size) // tp
    logits = build.max_batch_size * build.max_beam_width * config.vocab_size * 4 * 2  # float32, and the sampler's copy
    return build.max_num_tokens * per_token * DTYPES[build.dtype or config.dtype].itemsize + logits


def format_bytes(num_bytes: int) -> str:
    """Returns a size for people."""
    for unit, name in ((_GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit // 10:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} bytes"
