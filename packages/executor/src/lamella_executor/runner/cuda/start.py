"""How a CUDA runner starts: weights to the device, one large step to see what it takes, KV cache, recordings."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import torch

from lamella_core.errors import ConfigError, LamellaError, OutOfMemoryError
from lamella_core.kernels import triton as triton_kernels
from lamella_core.layers.parameter import set_parameter
from lamella_core.models.base import CausalLM
from lamella_core.placement import check_room, replan
from lamella_executor.attention.backend import AttentionBackend
from lamella_executor.attention.paged_cuda import DeviceKvCache
from lamella_executor.attention.states import state_bytes
from lamella_executor.attention.torch_backend import TorchAttention
from lamella_executor.distributed.pipeline import StageLinks
from lamella_executor.memory import KvCachePlan, block_bytes
from lamella_executor.runner.cuda.degraded import log_degraded
from lamella_executor.runner.cuda.dry_run import dry_plans
from lamella_executor.runner.cuda.graphs import capture_sizes
from lamella_executor.runner.cuda.memory import (
    DeviceMemory,
    DeviceNeeds,
    activation_bytes,
    graph_bytes,
    logits_bytes,
    plan_device_memory,
)
from lamella_executor.runner.cuda.ops import DeviceOps, TorchOps, TritonOps
from lamella_executor.runner.cuda.runner import CudaRunner, DeviceParts
from lamella_executor.runner.cuda.stage import CudaStageRunner, PipelineStage
from lamella_executor.runner.cuda.state import RunnerLimits
from lamella_executor.runner.setup import RunnerSetup

logger = logging.getLogger(__name__)

ATTENTION_BACKENDS = ("auto", "triton", "flashinfer", "torch")
_MIB = 1 << 20
_HOPPER = 9  # major compute capability
_NO_MEMORY = ("out of memory", "ALLOC_FAILED")  # in errors of the driver and of libraries that torch has no class for
_STEP_LIMITS = "max_num_tokens or max_batch_size"


class StartTimes:
    """How long each phase of a start took."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - started

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
        return f"{phases}; {sum(self._seconds.values()):.1f} s in all"


def start_runner(
    setup: RunnerSetup, attn_backend: str = "auto", device: torch.device | str = "cuda"
) -> tuple[CudaRunner | CudaStageRunner, KvCachePlan]:
    """Returns a runner that is ready for its first step, and the size of its KV cache.

    Every rank of an engine calls this: their first steps and recordings meet in collectives.

    Args:
        setup: the model is moved to the device.
        attn_backend: one of `ATTENTION_BACKENDS`.
        device: "cuda", or the current device by its index; on "cpu" (tests) memory is not measured, and the cache must
            be given a size.

    Raises:
        ConfigError: an unknown backend, or one that this machine lacks.
        OutOfMemoryError: the engine does not fit on the device; the message has the numbers.
    """
    device = torch.device(device)
    times = StartTimes()
    with times.phase("weights"):
        move_weights(setup.model, device)
    with _out_of_memory_named("the memory that attention works in", _STEP_LIMITS):
        parts = choose_parts(attn_backend, device, setup.cache_dtype)
    log_degraded(setup, parts)
    limits = RunnerLimits(setup.max_sequences, setup.limits.max_num_tokens, setup.limits.max_seq_len)
    largest = f"the first step, of {limits.max_num_tokens} tokens and {limits.max_sequences} sequences at most,"
    with times.phase("first step"), torch.inference_mode(), _out_of_memory_named(largest, _STEP_LIMITS):
        workspace, state = _measure(setup, limits, parts)
    graph_rows = min(setup.limits.max_batch_size, setup.max_sequences)
    graphs = graph_bytes(setup.model.config, capture_sizes(graph_rows)) if device.type == "cuda" else 0
    recurrent = state_bytes(setup.model.state_specs(), setup.num_state_slots)
    plan = plan_device_memory(
        DeviceNeeds(setup.model.weight_bytes(), workspace, graphs, state, recurrent),
        _device_memory(device),
        setup.kv_config,
        setup.demand,
        block_bytes=block_bytes(setup.specs, setup.cache_dtype, setup.tokens_per_block),
        tokens_per_block=setup.tokens_per_block,
    )
    logger.info("device memory:\n%s", plan.table())
    kv = setup.agreed(plan.kv)
    knobs = f"KvCacheConfig.free_gpu_memory_fraction, {_STEP_LIMITS}"
    with times.phase("KV cache"), _out_of_memory_named("the KV cache, as planned above,", knobs):
        runner = _make_runner(setup, limits, parts, kv.num_blocks)
    free = _device_memory(device).free
    with times.phase("recording"), _out_of_memory_named("recording decoding steps", knobs):
        is_alone = setup.groups.mapping.world_size == 1
        runner.capture(min(graph_rows, kv.num_blocks), None if is_alone else setup.groups.agree_min)
    taken = (free - _device_memory(device).free) / _MIB
    logger.info("engine start: %s; recorded steps take %.0f MiB", times, taken)
    num_stages = setup.groups.mapping.pp_size
    return (runner if num_stages == 1 else CudaStageRunner(runner, num_stages)), kv


def move_weights(model: CausalLM, device: torch.device) -> None:
    """Gives a model's parameters and buffers memory on the device; those that are there already stay.

    Weights keep their kernels if those run there, and get the default ones if not.

    Raises:
        OutOfMemoryError: they do not fit.
    """
    check_room(model, device.type)
    with _out_of_memory_named(f"{model.weight_bytes() / _MIB:.0f} MiB of weights", "the weights' size (dtype, float8)"):
        for name, parameter in list(model.named_parameters()):
            if parameter.device.type != device.type:
                set_parameter(model, name, parameter.detach().to(device, non_blocking=True))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        replan(model)


def choose_parts(attn_backend: str, device: torch.device, cache_dtype: torch.dtype) -> DeviceParts:
    """Returns what computes on the device, over a KV cache of that dtype.

    Raises:
        ConfigError: an unknown backend, or one that this machine lacks.
    """
    if attn_backend not in ATTENTION_BACKENDS:
        raise ConfigError(f"attn_backend is {attn_backend!r}; allowed: {', '.join(ATTENTION_BACKENDS)}")
    has_triton = triton_kernels.is_available() and device.type == "cuda"
    if not has_triton and device.type == "cuda":
        logger.warning("triton is not installed: attention and sampling run through PyTorch, which is slow")
    ops: DeviceOps = TritonOps() if has_triton else TorchOps()
    return DeviceParts(_attention(attn_backend, has_triton, device, cache_dtype), ops, device)


def _has_faster_prompts(ours: AttentionBackend, cache_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FlashInfer is here and ahead of our Triton kernels for long prompts.

    Measured on an H100, bf16: 4 x 2048 tokens 301 us (fa3), 361 (Triton); 1 x 8192 995, 1161; 64 x 128 97, 82. Decoding
    and float8 caches are as fast or faster in Triton, and on other GPUs than Hopper there is no fa3. Layers that our
    kernel for Hopper serves are left to it: see `HopperPrompts`.
    """
    if ours.name != "triton" or cache_dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return False
    from lamella_executor.attention.flashinfer_backend import why_no_flashinfer

    reason = why_no_flashinfer()
    if reason is not None:
        logger.info("long prompts under windows or of large heads would be faster with FlashInfer, but %s", reason)
    return reason is None


def _attention(name: str, has_triton: bool, device: torch.device, cache_dtype: torch.dtype) -> AttentionBackend:
    backend: AttentionBackend = TorchAttention()
    if has_triton and name != "torch":
        from lamella_executor.attention.triton_backend import TritonAttention

        backend = TritonAttention()
    elif name == "triton":
        raise ConfigError("attn_backend is 'triton', but triton is not installed; install it or use 'auto'")
    if name == "flashinfer" or (name == "auto" and _has_faster_prompts(backend, cache_dtype, device)):
        from lamella_executor.attention.flashinfer_backend import LONG_PROMPT, FlashInferAttention

        if name == "flashinfer":
            backend = FlashInferAttention(backend, device)
        else:
            backend = FlashInferAttention(backend, device, decode=False, least_prompt=LONG_PROMPT)
    logger.info("attention: %s", backend.name)
    return backend


def _make_runner(
    setup: RunnerSetup, limits: RunnerLimits, parts: DeviceParts, num_blocks: int, *, is_dry: bool = False
) -> CudaRunner:
    states = setup.make_states(parts.device, is_dry=is_dry)
    cache = DeviceKvCache(setup.specs, num_blocks, setup.tokens_per_block, setup.cache_dtype, parts.device, states)
    config, stage = setup.model.config, None
    if setup.groups.mapping.pp_size > 1:
        rows = max(limits.max_num_tokens, limits.max_sequences)
        stage = PipelineStage(
            StageLinks(setup.groups), rows, config.hidden_size, config.vocab_size, config.torch_dtype, parts.device
        )
    return CudaRunner(setup.model, cache, setup.windows, limits, parts, setup.groups.tp, stage)


def _measure(setup: RunnerSetup, limits: RunnerLimits, parts: DeviceParts) -> tuple[int, int]:
    """Runs the largest steps; returns the memory they took, and that of the runner's tables and buffers, in bytes.

    It also compiles the kernels that steps outside recordings use.
    """
    if parts.device.type != "cuda":
        config = setup.model.config
        return activation_bytes(config, limits.max_num_tokens) + logits_bytes(config, limits.max_sequences), 0
    before = torch.cuda.memory_allocated()
    runner = _make_runner(setup, limits, parts, 1, is_dry=True)
    torch.cuda.current_stream().synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for plan in dry_plans(limits, setup.tokens_per_block, scratch_block=1):
        runner.launch(plan).collect()
    peak = torch.cuda.max_memory_allocated()
    state = held - before - runner.cache_bytes
    runner.close()
    return peak - held, state


def _device_memory(device: torch.device) -> DeviceMemory:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(total, free)
    from lamella_core.host_memory import available_bytes

    return DeviceMemory(available_bytes(), available_bytes())


@contextlib.contextmanager
def _out_of_memory_named(what: str, knobs: str) -> Iterator[None]:
    """Turns the device's out-of-memory errors into ours, which says what found no memory and what to lower."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LamellaError) or not _is_out_of_memory(error):
            raise
        free, total = torch.cuda.mem_get_info()
        raise OutOfMemoryError(
            f"{what} found no memory on the device: {free / _MIB:.0f} of {total / _MIB:.0f} MiB are free ({error}). "
            f"Free memory that other processes hold, or lower {knobs}"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _NO_MEMORY)
