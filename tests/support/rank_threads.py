"""An engine of several ranks in one process: a thread for each rank but the first, real groups between them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.support.executors import BLOCK, Bench
from tests.support.tiny_models import hf_dir

from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_executor import CapacitySchedulerPolicy, GenerationExecutor
from lamella_executor.admission import EngineLimits
from lamella_executor.attention.paged_cpu import PagedKvCache, layer_windows
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.pipeline import StageLinks
from lamella_executor.distributed.store import host_store, reach_store
from lamella_executor.kv_cache import KvCacheManager
from lamella_executor.loop import EngineLoop
from lamella_executor.runner.model_runner import ModelRunner
from lamella_executor.runner.stage import StageRunner
from lamella_executor.sampler import Sampler
from lamella_executor.scheduler.plan import StepPlan
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.stats import StatsBuffer
from lamella_executor.worker.plan_wire import PlanDecoder, PlanEncoder

MakeRunner = Callable[[Any, RankGroups, int], Any]  # (model, groups, num_blocks) -> runner


def cpu_stage(model: Any, groups: RankGroups, num_blocks: int) -> Any:
    """One rank's runner on the CPU."""
    specs = model.attention_specs()
    cache = PagedKvCache(specs, num_blocks, BLOCK, model.config.torch_dtype)
    runner = ModelRunner(model, cache, layer_windows(specs, None, 0), groups.tp)
    return StageRunner(runner, StageLinks(groups)) if groups.mapping.pp_size > 1 else runner


@dataclass
class Leader:
    """Rank 0's runner: tells the other ranks each plan, then computes its own part."""

    inner: Any
    encoder: PlanEncoder
    orders: list[queue.Queue[bytes | None]]
    depths: list[int] = field(default_factory=list)  # steps in flight beside each launched one
    num_launched: int = 0
    num_collected: int = 0

    @property
    def max_in_flight(self) -> int:
        return self.inner.max_in_flight

    @property
    def is_sampling(self) -> bool:
        return self.inner.is_sampling

    def launch(self, plan: StepPlan) -> Any:
        buffer = self.encoder.encode(plan)
        for order in self.orders:
            order.put(buffer)
        self.depths.append(self.num_launched - self.num_collected)
        self.num_launched += 1
        return _Step(self, self.inner.launch(plan))


@dataclass
class _Step:
    leader: Leader
    inner: Any

    @property
    def logits(self) -> Any:
        return self.inner.logits

    def collect(self) -> list[int]:
        tokens = self.inner.collect()
        self.leader.num_collected += 1
        return tokens


def join_all(mapping: Mapping) -> list[RankGroups]:
    store = host_store()

    def join(rank: int) -> RankGroups:
        own = reach_store("127.0.0.1", store.port)
        return RankGroups.join(mapping.with_rank(rank), own, device="cpu", timeout_s=30.0)

    with ThreadPoolExecutor(mapping.world_size) as pool:
        return list(pool.map(join, range(mapping.world_size)))


def follow(runner: Any, orders: queue.Queue[bytes | None], trouble: list[BaseException]) -> None:
    """What a worker does."""
    decoder = PlanDecoder()
    try:
        while (order := orders.get()) is not None:
            runner.launch(decoder.decode(order))
        runner.close()
    except BaseException as error:  # the test asserts on it
        trouble.append(error)


@contextlib.contextmanager
def staged(
    mapping: Mapping,
    model: tuple[str, str],
    *,
    num_tokens: int = 1024,
    max_num_tokens: int = 64,
    policy: str = "GUARANTEED_NO_EVICT",
    make: MakeRunner = cpu_stage,
    breaks: bool = False,
    **load: Any,
) -> Iterator[tuple[Bench, Leader]]:
    """Runs a tiny model over the ranks of a mapping with more than one stage.

    Args:
        mapping: with any rank.
        model: its name.
        num_tokens: of the KV cache.
        max_num_tokens: rows of a step.
        policy: of the scheduler.
        make: each rank's runner.
        breaks: the test breaks the groups, and the other ranks must notice.
        load: for from_hugging_face.
    """
    source = (get_model_class(model[0]), hf_dir(*model))
    models = [
        source[0].from_hugging_face(source[1], mapping=mapping.with_rank(rank), **load)
        for rank in range(mapping.world_size)
    ]
    groups, num_blocks = join_all(mapping), num_tokens // BLOCK
    vocab_size, prefix_rule = models[0].config.vocab_size, models[0].config.prefix_rule
    limits = EngineLimits(vocab_size, 128, 8, max_num_tokens, 8, prefix_rule=prefix_rule)
    for each in models:
        each.set_max_seq_len(limits.max_seq_len)
    runners = [make(each, group, num_blocks) for each, group in zip(models, groups, strict=True)]
    orders: list[queue.Queue[bytes | None]] = [queue.Queue() for _ in runners[1:]]
    trouble: list[BaseException] = []
    threads = [
        threading.Thread(target=follow, args=(runner, order, trouble)) for runner, order in zip(runners[1:], orders)
    ]
    for thread in threads:
        thread.start()
    leader = Leader(runners[0], PlanEncoder(BLOCK), orders)
    kv = KvCacheManager(num_blocks, BLOCK, enable_block_reuse=prefix_rule is None)
    scheduler = Scheduler(
        kv, max_batch_size=limits.max_batch_size, max_num_tokens=max_num_tokens, max_beam_width=8,
        policy=CapacitySchedulerPolicy(policy), num_micro_batches=leader.max_in_flight,
    )  # fmt: skip
    stats = StatsBuffer()
    loop = EngineLoop(leader, scheduler, kv, Sampler(vocab_size), stats)
    executor = GenerationExecutor(loop, limits, stats=stats, check_fits=scheduler.check_fits, close=runners[0].close)
    try:
        with executor:
            yield Bench(executor, loop, kv), leader
    finally:
        for order in orders:
            order.put(None)
        for group in groups if trouble else ():
            group.abort()
        for thread in threads:
            thread.join(30)
        for group in groups:
            group.close()
    assert breaks == bool(trouble), trouble
    assert not any(thread.is_alive() for thread in threads)
