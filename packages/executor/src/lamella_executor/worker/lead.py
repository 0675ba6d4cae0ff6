"""How rank 0 leads: starts the other ranks, loads and assembles with them, and ends them with the engine."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.distributed import TCPStore

from lamella_core.errors import ConfigError, WorkerError
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.store import host_store
from lamella_executor.runner.distributed import VERDICT_S, Sender
from lamella_executor.worker.crew import Crew
from lamella_executor.worker.interruptible import run_interruptibly
from lamella_executor.worker.launchers import find_launcher
from lamella_executor.worker.messages import Load, Setup, Start
from lamella_executor.worker.threads import limit_threads

if TYPE_CHECKING:
    from lamella_core.engine import Engine
    from lamella_executor.worker.options import RankOptions
    from lamella_executor.worker.process import Launcher
    from lamella_executor.worker.recipe import EngineRecipe

logger = logging.getLogger(__name__)

STOP_S = 2.0  # for workers to end by themselves
STALL_FACTOR = 10  # times worker_timeout_s: how long a step, or a phase of the start, may keep a live rank
_START_LIMIT_S = 86400.0  # loading is as slow as its disk, and heartbeats tell who is alive

T = TypeVar("T")


class Alarm:
    """What rank 0 does as soon as one rank has failed: tells the executor, then frees whoever waits in a collective.

    Any thread may sound it, and does not wait; only the first time counts.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._failure: WorkerError | None = None
        self._listener: Callable[[BaseException], None] | None = None
        self._groups: RankGroups | None = None
        self._aborts: list[threading.Thread] = []

    def __call__(self, failure: WorkerError) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
            listener, groups = self._listener, self._groups
        self.stop.set()
        if listener is not None:
            listener(failure)
        if groups is not None:
            self._abort(groups)

    def connect(self, listener: Callable[[BaseException], None]) -> None:
        """Names who is told; at once, if it is too late for later."""
        with self._lock:
            failure, self._listener = self._failure, listener
        if failure is not None:
            listener(failure)

    def guard(self, groups: RankGroups) -> None:
        """Names the groups to abort."""
        with self._lock:
            failure, self._groups = self._failure, groups
        if failure is not None:
            self._abort(groups)

    def settle(self, timeout_s: float) -> bool:
        """Waits until what it began has ended; returns whether it has."""
        for thread in self._aborts:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._aborts)

    def _abort(self, groups: RankGroups) -> None:
        """Aborts on a thread of its own: a broken device may keep whoever does it, and the watcher has more to do."""
        thread = threading.Thread(target=groups.abort, name="lamella-abort", daemon=True)
        self._aborts.append(thread)
        thread.start()


class Ranks:
    """All ranks of one engine as rank 0 has them: processes, store, groups. Whoever makes it calls `close`.

    Args:
        recipe: where each rank's shard comes from; of more than one rank.
        options: for all ranks; ``hosts`` are filled in.
        worker_timeout_s: silence that counts as death.

    Raises:
        ConfigError: this machine, or this launch, has not as many GPUs or processes as there are ranks.
        WorkerError: a process did not start.
    """

    def __init__(self, recipe: EngineRecipe, options: RankOptions, *, worker_timeout_s: float) -> None:
        self.alarm = Alarm()
        self._recipe = recipe
        world_size = recipe.world_size
        launcher = find_launcher(world_size)
        try:
            hosts = tuple(launcher.hosts[rank] for rank in range(world_size))
            stall_timeout_s = STALL_FACTOR * worker_timeout_s
            self._options = dataclasses.replace(options, hosts=hosts, stall_timeout_s=stall_timeout_s)
            self._device_index = launcher.device_indices[0]
            _check_devices(recipe, launcher)
            self._num_threads = max(1, torch.get_num_threads() // self._options.ranks_beside(0))
            store = host_store(hosts[0])
            self._store: TCPStore | None = store
            setup = Setup(
                rank=0,
                world_size=world_size,
                store_host=hosts[0],
                store_port=store.port,
                mapping=recipe.mapping.to_dict(),
                device=recipe.device,
                device_index=self._device_index,
                num_threads=self._num_threads,
                worker_timeout_s=worker_timeout_s,
                log_level=logging.getLogger("lamella_executor").getEffectiveLevel(),
            )
        except BaseException:
            launcher.close()
            raise
        self._groups: RankGroups | None = None
        self._crew = Crew(
            launcher,
            setup,
            worker_timeout_s=worker_timeout_s,
            on_failure=self.alarm,
            stall_timeout_s=stall_timeout_s,
        )

    def start(self, assemble: Callable[[Engine, RankGroups, RankOptions], T]) -> T:
        """Loads and assembles on all ranks at once; returns what ``assemble`` returns on this one.

        Raises:
            WorkerError: another rank failed. Errors of this rank are raised as they are. `close` is due in any case.
        """
        try:
            return run_interruptibly(lambda: self._start(assemble), self._check)
        except BaseException:
            self.alarm(WorkerError("the start was given up"))  # for workers that wait for this rank
            raise

    def _start(self, assemble: Callable[[Engine, RankGroups, RankOptions], T]) -> T:
        crew, recipe, options = self._crew, self._recipe, self._options
        device = self._use_device()
        crew.set_phase("load")
        crew.broadcast(Load(recipe.target, recipe.encode_arguments()))
        engine = recipe.load(0)
        crew.wait_ready("load", _START_LIMIT_S)
        crew.set_phase("start")
        crew.broadcast(Start(options.encode()))
        try:
            assembled = assemble(engine, self._join(device), options)
        except WorkerError:
            raise
        except RuntimeError as error:
            failure = crew.await_failure(VERDICT_S)
            if failure is None:
                raise
            raise WorkerError(*failure.args) from error
        crew.wait_ready("start", _START_LIMIT_S)
        return assembled

    def _join(self, device: str) -> RankGroups:
        if self._store is None:
            raise WorkerError("the start was given up")
        self._groups = RankGroups.join(
            self._recipe.mapping,
            self._store,
            device=device,
            timeout_s=self._options.stall_timeout_s,
            address=self._options.hosts[0],
            stop=self.alarm.stop,
        )
        self.alarm.guard(self._groups)
        return self._groups

    def sender(self, tokens_per_block: int) -> Sender:
        """Returns what sends plans to the other ranks; used by one thread, which is rank 0's from then on."""
        return Sender(self._crew, tokens_per_block, self.alarm, self._use_device)

    def close(self, close_runner: Callable[[], None] | None = None) -> None:
        """Ends all workers within seconds, then gives back what rank 0 holds; nothing may be running here."""
        self._crew.stop(STOP_S)
        if close_runner is not None:
            close_runner()
        if self.alarm.settle(STOP_S) and self._groups is not None:
            self._groups.close()
        self._store = None

    def _use_device(self) -> str:
        """Makes the calling thread use rank 0's device, or its share of the machine's cores; returns its name."""
        if self._recipe.device == "cuda":
            torch.cuda.set_device(self._device_index)
            return f"cuda:{self._device_index}"
        limit_threads(self._num_threads)
        return self._recipe.device

    def _check(self) -> None:
        failure = self._crew.failure
        if failure is not None:
            raise WorkerError(*failure.args)


def _check_devices(recipe: EngineRecipe, launcher: Launcher) -> None:
    """Refuses to start more ranks on this machine than it has GPUs; workers elsewhere see for themselves."""
    if recipe.device != "cuda":
        return
    count = torch.cuda.device_count()
    mine = [index for rank, index in launcher.device_indices.items() if launcher.hosts[rank] == launcher.hosts[0]]
    if max(mine) < count:
        return
    mapping = recipe.mapping
    raise ConfigError(
        f"the engine is for {recipe.world_size} ranks (tp_size {mapping.tp_size} x pp_size {mapping.pp_size}), one GPU "
        f"each, and {len(mine)} of them are to run on this machine, which has {count}. Build it again for fewer ranks, "
        f"`lamella-build --tp_size {count} --pp_size 1 ...` (in an LLM: tensor_parallel_size={count}), or start it on "
        "more machines with lamella-launch"
    )
