"""What a worker serves: one rank of an engine. It loads its shard, joins the others, then computes plan after plan."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from typing import TypeVar

import torch

from lamella_core.errors import ConfigError
from lamella_core.mapping import Mapping
from lamella_executor.assemble import assemble_rank
from lamella_executor.distributed.groups import RankGroups
from lamella_executor.distributed.store import reach_store
from lamella_executor.runner.base import LaunchedStep, LaunchingRunner, PipelinedRunner, Runner
from lamella_executor.runner.distributed import phase_of
from lamella_executor.scheduler.plan import StepPlan
from lamella_executor.worker.channel import STEP, Channel, ChannelError, ChannelTimeout, Frame
from lamella_executor.worker.entry import WorkerState
from lamella_executor.worker.messages import Load, Ready, Setup, Start, Stop
from lamella_executor.worker.options import RankOptions
from lamella_executor.worker.plan_wire import PlanDecoder
from lamella_executor.worker.recipe import EngineRecipe

IDLE_S = 0.2  # without a step after which the last one is waited for, so that its errors show

M = TypeVar("M", Load, Start)


def serve(channel: Channel, setup: Setup, state: WorkerState) -> None:
    """Follows rank 0 until it says Stop or is gone."""
    state.phase = "load"
    device = _take_device(setup)
    mapping = Mapping.from_dict(setup.mapping)
    load = _await(channel, Load)
    if load is None:
        return
    engine = EngineRecipe(load.target, json.loads(load.arguments), mapping, setup.device).load(setup.rank)
    channel.send(Ready("load"))
    start = _await(channel, Start)
    if start is None:
        return
    state.phase = "start"
    options = RankOptions.decode(start.options)
    store = reach_store(setup.store_host, setup.store_port)
    with contextlib.ExitStack() as cleanup:
        groups = RankGroups.join(
            mapping, store, device=device, timeout_s=options.stall_timeout_s, address=options.hosts[setup.rank]
        )
        cleanup.callback(groups.close)
        runner = assemble_rank(engine, groups, options).runner
        cleanup.callback(getattr(runner, "close", lambda: None))
        channel.send(Ready("start"))
        _follow(channel, Follower(runner, state))


class Follower:
    """Computes the plans of rank 0, launched ahead as rank 0 does; results stay here, rank 0 has the same.

    Args:
        runner: this rank's.
        state: told what the worker is at.
    """

    def __init__(self, runner: Runner | LaunchingRunner | PipelinedRunner, state: WorkerState) -> None:
        self._runner = runner
        self._state = state
        self._most = runner.max_in_flight - 1 if isinstance(runner, PipelinedRunner) else 1
        self._launches: deque[LaunchedStep] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is launched and not yet waited for."""
        return not self._launches

    def step(self, plan: StepPlan) -> None:
        """Launches a plan, then waits for older ones."""
        self._state.phase = phase_of(plan)
        if isinstance(self._runner, LaunchingRunner):
            self._launches.append(self._runner.launch(plan))
            while len(self._launches) > self._most:
                self._collect()
        else:
            self._runner.run(plan)
            self._state.step += 1

    def finish(self) -> None:
        """Waits for all that was launched."""
        while self._launches:
            self._collect()

    def _collect(self) -> None:
        self._launches.popleft().collect()
        self._state.step += 1


def _follow(channel: Channel, follower: Follower) -> None:
    decoder = PlanDecoder()
    while True:
        frame = _next_frame(channel, follower)
        if frame is None:
            return
        if frame.kind == STEP:
            follower.step(decoder.decode(frame.payload))
        elif isinstance(frame.message(), Stop):
            follower.finish()
            return
        else:
            raise ChannelError(f"a {type(frame.message()).__name__} came instead of a step")


def _next_frame(channel: Channel, follower: Follower) -> Frame | None:
    if not follower.is_idle:
        try:
            return channel.receive(IDLE_S)
        except ChannelTimeout:
            follower.finish()
    return channel.receive()


def _take_device(setup: Setup) -> str:
    """Makes this process use its own device and share of the machine's cores; returns the device's name.

    Raises:
        ConfigError: the machine has no such device.
    """
    if setup.num_threads:
        torch.set_num_threads(setup.num_threads)
    if setup.device != "cuda":
        return setup.device
    count = torch.cuda.device_count()
    if setup.device_index >= count:
        raise ConfigError(
            f"rank {setup.rank} is to use GPU {setup.device_index} of its machine, which has {count}; start fewer "
            "ranks there, or let CUDA_VISIBLE_DEVICES name more"
        )
    torch.cuda.set_device(setup.device_index)
    return f"cuda:{setup.device_index}"


def _await(channel: Channel, kind: type[M]) -> M | None:
    """Returns the next message, None if there is nothing more to do.

    Raises:
        ChannelError: another message came.
    """
    frame = channel.receive()
    message = frame.message() if frame is not None else None
    if message is None or isinstance(message, Stop):
        return None
    if not isinstance(message, kind):
        raise ChannelError(f"a {type(message).__name__} came where a {kind.__name__} was expected")
    return message
