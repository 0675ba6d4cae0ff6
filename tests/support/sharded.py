"""Engines of several ranks on disk, and executors over them: ranks as processes, or as threads of this one."""

from __future__ import annotations

import contextlib
import functools
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.executors import BLOCK
from tests.support.tiny_models import hf_dir

from lamella_core.engine import BuildConfig, Engine, EngineWriter
from lamella_core.errors import WorkerError
from lamella_core.mapping import Mapping
from lamella_core.models.registry import get_model_class
from lamella_executor import GenerationExecutor, KvCacheConfig
from lamella_executor.assemble import assemble_rank
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.store import host_store, reach_store
from lamella_executor.runner.distributed import Sender
from lamella_executor.worker.entry import WorkerState
from lamella_executor.worker.lead import Alarm
from lamella_executor.worker.options import RankOptions
from lamella_executor.worker.plan_wire import PlanDecoder
from lamella_executor.worker.recipe import EngineRecipe
from lamella_executor.worker.serve import Follower

LIMITS = {"max_batch_size": 8, "max_num_tokens": 16, "tokens_per_block": BLOCK, "max_beam_width": 8, "device": "cpu"}


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sharded-engines-")


@functools.cache
def sharded_engine(architecture: str, variant: str, tp_size: int, moe_ep_size: int = 1) -> Path:
    """Returns a directory with the engine of a tiny model for several ranks; the same one all session."""
    directory = Path(_root().name) / f"{architecture}-{variant}-{tp_size}-{moe_ep_size}"
    with EngineWriter(directory) as writer:
        for rank in range(tp_size):
            mapping = Mapping(world_size=tp_size, rank=rank, tp_size=tp_size, moe_ep_size=moe_ep_size)
            model = get_model_class(architecture).from_hugging_face(hf_dir(architecture, variant), mapping=mapping)
            engine = Engine.from_model(model, BuildConfig(**LIMITS))
            writer.add_rank(rank, engine.spec, engine.weights(rank))
    return directory


def open_engine(directory: Any, num_tokens: int = 1024, **options: Any) -> GenerationExecutor:
    """Returns an executor whose other ranks are processes."""
    return GenerationExecutor.create(directory, KvCacheConfig(max_tokens=num_tokens), **options)


class ThreadRanks:
    """`lamella_executor.worker.lead.Ranks` with a thread for each other rank, and no socket but the groups' own."""

    def __init__(self, recipe: EngineRecipe, options: RankOptions, *, worker_timeout_s: float) -> None:
        self.alarm = Alarm()
        self.failure: WorkerError | None = None
        self.recipe = recipe
        self.size = recipe.world_size
        self.options = replace(options, hosts=("127.0.0.1",) * self.size)
        self.store = host_store()
        self.pool = ThreadPoolExecutor(self.size)
        self.orders: list[queue.Queue[bytes | None]] = [queue.Queue() for _ in range(self.size)]
        self.states = [WorkerState() for _ in range(self.size)]
        self.groups: list[RankGroups | None] = [None] * self.size
        self.followers: list[Future[None]] = []
        self.phases: list[str] = []
        self.before_step: Callable[[int], None] = lambda rank: None  # called on a follower's thread

    def start(self, assemble: Callable[..., Any]) -> Any:
        for rank in range(1, self.size):
            self.followers.append(self.pool.submit(self._follow, rank))
        return self._assemble(0, assemble)

    def sender(self, tokens_per_block: int) -> Sender:
        self.last_sender = Sender(self, tokens_per_block, self.alarm)
        return self.last_sender

    def close(self, close_runner: Callable[[], None] | None = None) -> None:
        for order in self.orders:
            order.put(None)
        for groups in self.groups if self.failure is not None else ():
            if groups is not None:
                groups.abort()  # a process would be killed
        if close_runner is not None:
            close_runner()
        for follower in self.followers:
            follower.exception(30)
        for groups in self.groups:
            if groups is not None:
                groups.close()
        self.pool.shutdown()

    # what a `Sender` needs

    def set_phase(self, phase: str) -> None:
        self.phases.append(phase)

    def expect(self, step: int | None) -> None: ...

    def broadcast_frame(self, kind: int, payload: bytes | memoryview) -> None:
        for order in self.orders[1:]:
            order.put(bytes(payload))

    def await_failure(self, timeout_s: float) -> WorkerError | None:
        deadline = threading.Event()
        for _ in range(100):
            if self.failure is not None or deadline.wait(0.01):
                break
        return self.failure

    # the other ranks

    def _assemble(self, rank: int, assemble: Callable[..., Any]) -> Any:
        mapping = self.recipe.mapping.with_rank(rank)
        store = reach_store("127.0.0.1", self.store.port)
        self.groups[rank] = groups = RankGroups.join(mapping, store, device="cpu", timeout_s=30.0)
        if rank == 0:
            self.alarm.guard(groups)
        return assemble(self.recipe.load(rank), groups, self.options)

    def _follow(self, rank: int) -> None:
        try:
            follower, decoder = Follower(self._assemble(rank, assemble_rank).runner, self.states[rank]), PlanDecoder()
            while (order := self.orders[rank].get()) is not None:
                self.before_step(rank)
                follower.step(decoder.decode(order))
            follower.finish()
        except BaseException as error:
            self.failure = WorkerError(f"rank {rank} failed in phase {self.states[rank].phase}: {error}")
            self.alarm(self.failure)
            raise


@contextlib.contextmanager
def threaded(
    directory: Any, num_tokens: int = 1024, **options: Any
) -> Iterator[tuple[GenerationExecutor, ThreadRanks]]:
    """Runs an executor whose other ranks are threads."""
    made: list[ThreadRanks] = []

    def make(*args: Any, **kwargs: Any) -> ThreadRanks:
        made.append(ThreadRanks(*args, **kwargs))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamella_executor.assemble.Ranks", make)
        executor = open_engine(directory, num_tokens, **options)
    with executor:
        yield executor, made[0]
