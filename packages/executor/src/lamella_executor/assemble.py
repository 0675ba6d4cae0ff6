"""assemble(): an engine and its configuration become the parts that an executor runs.

`assemble_rank` makes what every rank of an engine has, in its own process: model, cache, runner. What ranks must agree
on they settle there by collectives, so all of them run the same code. The rest is rank 0's alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lamella_core.checkpoint.formats import detect_format
from lamella_core.engine import BuildConfig, Engine
from lamella_core.errors import ConfigError, EngineFormatError
from lamella_core.host_memory import available_bytes
from lamella_executor.admission import EngineLimits
from lamella_executor.attention.paged_cpu import LayerWindow, PagedKvCache, layer_windows
from lamella_executor.attention.states import state_bytes
from lamella_executor.config import KvCacheConfig, SchedulerConfig
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.pipeline import StageLinks
from lamella_executor.kv_cache.manager import KvCacheManager
from lamella_executor.loop import EngineLoop
from lamella_executor.memory import KvCacheDemand, KvCachePlan, plan_kv_cache
from lamella_executor.runner.base import LaunchingRunner, PipelinedRunner, Runner
from lamella_executor.runner.distributed import distribute
from lamella_executor.runner.model_runner import ModelRunner
from lamella_executor.runner.setup import RunnerSetup
from lamella_executor.runner.stage import StageRunner
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.sequence import RequestState
from lamella_executor.stats import StatsBuffer
from lamella_executor.worker.lead import Ranks
from lamella_executor.worker.options import RankOptions
from lamella_executor.worker.recipe import EngineRecipe, find_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

CUDA_ROW_TILE = 256  # rows of the tiles in which GPUs compute large matrix products

_WHOLE = 1 << 40  # tokens: the window of a layer that has none


@dataclass(frozen=True)
class ExecutorParts:
    """What `GenerationExecutor` is made of."""

    loop: EngineLoop
    limits: EngineLimits
    stats: StatsBuffer
    check_fits: Callable[[RequestState], None]
    close: Callable[[], None] | None = None  # ends other ranks, gives back a device's memory; nothing may be running
    connect: Callable[[Callable[[BaseException], None]], None] | None = None  # names who hears at once of a failed rank


@dataclass(frozen=True)
class RankParts:
    """What one rank is made of."""

    build: BuildConfig
    setup: RunnerSetup
    runner: Runner | LaunchingRunner
    plan: KvCachePlan  # its number of blocks is that of all ranks


def assemble(
    engine: Engine | EngineRecipe | str | Path,
    kv_config: KvCacheConfig,
    scheduler_config: SchedulerConfig,
    *,
    max_batch_size: int | None = None,
    max_num_tokens: int | None = None,
    stats_capacity: int = 1000,
    attn_backend: str = "auto",
    worker_timeout_s: float = 30.0,
) -> ExecutorParts:
    """Loads the model, sizes and reserves the KV cache, and connects the parts; see `GenerationExecutor.create`."""
    options = RankOptions(kv_config, max_batch_size, max_num_tokens, attn_backend)
    recipe = find_recipe(engine)
    if recipe is None:
        loaded = load_engine(engine)
        rank = assemble_rank(loaded, RankGroups.single(loaded.device), options)
        return _connect(rank, rank.runner, scheduler_config, stats_capacity)
    ranks = Ranks(recipe, options, worker_timeout_s=worker_timeout_s)
    try:
        rank = ranks.start(assemble_rank)
        runner = distribute(rank.runner, ranks.sender(rank.plan.tokens_per_block))
        parts = _connect(rank, runner, scheduler_config, stats_capacity)
    except BaseException:
        ranks.close()
        raise
    return replace(parts, close=partial(ranks.close, parts.close), connect=ranks.alarm.connect)


def assemble_rank(engine: Engine, groups: RankGroups, options: RankOptions) -> RankParts:
    """Makes one rank's model, cache and runner; every rank of the engine must call this.

    Raises:
        ConfigError, OutOfMemoryError: see `GenerationExecutor.create`.
        CommunicationError: another rank failed.
    """
    setup = _setup(engine, groups, options)
    runner, plan = _start(engine, setup, options)
    logger.info("KV cache: %d blocks of %d tokens, %d bytes", plan.num_blocks, plan.tokens_per_block, plan.num_bytes)
    return RankParts(engine.spec.build, setup, runner, plan)


def _connect(
    rank: RankParts, runner: Runner | LaunchingRunner, scheduler_config: SchedulerConfig, stats_capacity: int
) -> ExecutorParts:
    """Makes rank 0's scheduler and loop around a runner of all ranks."""
    setup, plan = rank.setup, rank.plan
    limits, kv_config = setup.limits, setup.kv_config
    is_paged = rank.build.kv_cache_type == "paged"
    if setup.num_state_slots:
        logger.info(
            "%d slots of recurrent states; prefixes are not reused, their states are not kept", setup.max_sequences
        )
    reuses = is_paged and limits.prefix_rule is None  # what a token is depends on all of a prompt read both ways
    kv = KvCacheManager(
        plan.num_blocks,
        plan.tokens_per_block,
        enable_block_reuse=kv_config.enable_block_reuse and reuses,
        enable_partial_reuse=kv_config.enable_partial_reuse and reuses,
        window=setup.window,
        num_sinks=kv_config.sink_token_length,
        num_state_slots=setup.num_state_slots,
    )
    scheduler = Scheduler(
        kv,
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_num_tokens,
        policy=scheduler_config.policy_for(rank.build.device),
        enable_chunked_prefill=scheduler_config.enable_chunked_prefill,
        max_beam_width=limits.max_beam_width,
        num_micro_batches=runner.max_in_flight if isinstance(runner, PipelinedRunner) else 1,
        row_tile=CUDA_ROW_TILE if rank.build.device == "cuda" else 1,
    )
    stats = StatsBuffer(stats_capacity)
    loop = EngineLoop(runner, scheduler, kv, Sampler(limits.vocab_size), stats)
    return ExecutorParts(loop, limits, stats, scheduler.check_fits, getattr(rank.runner, "close", None))


def _setup(engine: Engine, groups: RankGroups, options: RankOptions) -> RunnerSetup:
    """Loads a rank's model and resolves what its runner needs to know."""
    build, rank = engine.spec.build, groups.mapping.rank
    kv_config = options.own_kv_config(rank)
    if kv_config.dtype == "fp8" and engine.spec.model.quantization.kv_cache_quant_algo is None:
        raise ConfigError(
            "KvCacheConfig.dtype is 'fp8', but the engine's KV cache has the model's dtype; build it with "
            "QuantConfig(kv_cache_quant_algo='FP8')"
        )
    limits = engine_limits(engine, options.max_batch_size, options.max_num_tokens)
    if limits.prefix_rule is not None and kv_config.max_attention_window:
        raise ConfigError(
            f"KvCacheConfig.max_attention_window is {kv_config.max_attention_window}, but "
            f"{engine.spec.model.architecture} reads prompts in both directions; leave it out"
        )
    model = engine.model(rank)
    model.set_max_seq_len(limits.max_seq_len)
    specs = model.attention_specs()
    windows = layer_windows(specs, _windows(kv_config), kv_config.sink_token_length)
    tokens_per_block = _tokens_per_block(build, kv_config, limits.max_seq_len)
    window = _widest(windows, groups)
    demand = _demand(build, limits, window, kv_config.sink_token_length, tokens_per_block)
    return RunnerSetup(model, specs, windows, tokens_per_block, limits, kv_config, demand, groups, window)


def _start(
    engine: Engine, setup: RunnerSetup, options: RankOptions
) -> tuple[Runner | LaunchingRunner, KvCachePlan]:  # fmt: skip
    """Returns the runner of the engine's device, its KV cache allocated, and the cache's size."""
    warning = engine.check_machine()
    if warning is not None:
        logger.warning("%s", warning)
    if engine.device == "cuda":
        from lamella_executor.runner.cuda.start import start_runner  # imports what a CPU has no use for

        return start_runner(setup, options.attn_backend, setup.groups.device)
    if options.attn_backend != "auto":
        raise ConfigError(
            f"attn_backend is {options.attn_backend!r}; an engine on the CPU has one alone, leave it at 'auto'"
        )
    dtype, groups = engine.spec.model.torch_dtype, setup.groups
    free = available_bytes() // options.ranks_beside(groups.mapping.rank)
    needed = state_bytes(setup.model.state_specs(), setup.num_state_slots)
    plan = plan_kv_cache(
        setup.specs, dtype, setup.tokens_per_block, setup.kv_config, setup.demand, free, state_bytes=needed
    )
    plan = setup.agreed(plan)
    cache = PagedKvCache(setup.specs, plan.num_blocks, setup.tokens_per_block, dtype, setup.make_states("cpu"))
    runner = ModelRunner(setup.model, cache, setup.windows, groups.tp)
    return (runner if groups.mapping.pp_size == 1 else StageRunner(runner, StageLinks(groups))), plan


def load_engine(engine: Engine | EngineRecipe | str | Path) -> Engine:
    """Returns the engine, read from its directory or as rank 0 gets it from its recipe.

    Raises:
        EngineFormatError: the directory holds a model that is not built, or is damaged.
    """
    if isinstance(engine, Engine):
        return engine
    if isinstance(engine, EngineRecipe):
        return engine.load(0)
    found = detect_format(engine)
    if found != "engine":
        what = {"hugging_face": "a Hugging Face directory", "checkpoint": "a Lamella checkpoint"}[found]
        raise EngineFormatError(
            f"{engine} is {what}, and the executor runs engines: build one with lamella-build or lamella_builder, "
            "or use lamella.LLM, which takes all three"
        )
    return Engine.load(engine)


def engine_limits(engine: Engine, max_batch_size: int | None, max_num_tokens: int | None) -> EngineLimits:
    """Returns what bounds an engine's requests; the two numbers lower what it was built for.

    Raises:
        ConfigError: a number is larger than the engine's, or not positive.
    """
    build, config = engine.spec.build, engine.spec.model
    return EngineLimits(
        vocab_size=config.vocab_size,
        max_seq_len=build.max_seq_len or config.max_position_embeddings,
        max_batch_size=_lowered("max_batch_size", max_batch_size, build.max_batch_size),
        max_num_tokens=_lowered("max_num_tokens", max_num_tokens, build.max_num_tokens),
        max_beam_width=build.max_beam_width,
        max_input_len=build.max_input_len,
        eos_token_ids=config.eos_token_ids,
        max_output_len=1 if build.kv_cache_type == "disabled" else None,
        prefix_rule=config.prefix_rule,
    )


def _lowered(name: str, asked: int | None, built: int) -> int:
    if asked is None:
        return built
    if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= built:
        raise ConfigError(
            f"{name} is {asked!r}; the engine was built for {built}, so it must be in 1..{built}. Build again for more"
        )
    return asked


def _windows(kv_config: KvCacheConfig) -> tuple[int, ...] | None:
    window = kv_config.max_attention_window
    return (window,) if isinstance(window, int) else window


def _widest(windows: dict[int, LayerWindow], groups: RankGroups) -> int | None:
    """Returns how far back some layer of all ranks looks; None if one sees everything, or none looks back."""
    widest = -groups.agree_min(-max([window.length or _WHOLE for window in windows.values()], default=0))
    return None if widest in (0, _WHOLE) else widest


def _tokens_per_block(build: BuildConfig, kv_config: KvCacheConfig, max_seq_len: int) -> int:
    if build.kv_cache_type == "continuous":
        if kv_config.tokens_per_block not in (None, max_seq_len):
            raise ConfigError(
                f"KvCacheConfig.tokens_per_block is {kv_config.tokens_per_block}, but the engine was built with "
                f"kv_cache_type='continuous', one block of max_seq_len {max_seq_len} per sequence; leave it unset"
            )
        return max_seq_len
    return kv_config.tokens_per_block or build.tokens_per_block


def _demand(
    build: BuildConfig, limits: EngineLimits, window: int | None, num_sinks: int, tokens_per_block: int
) -> KvCacheDemand:
    resident = limits.max_seq_len
    if window is not None:  # sinks, window and the chunk being computed, each rounded up to blocks
        resident = min(resident, num_sinks + window + limits.max_num_tokens + 2 * tokens_per_block)
    return KvCacheDemand(limits.max_batch_size * build.max_beam_width, resident)
